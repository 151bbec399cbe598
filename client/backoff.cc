#include "client/backoff.h"

#include <algorithm>

namespace walsh::client {

absl::Duration Backoff::Next() {
  std::uniform_real_distribution<double> factor(1.0 - options_.jitter, 1.0 + options_.jitter);
  const absl::Duration pause = next_ * factor(random_);
  next_ = std::min(next_ * options_.multiplier, options_.max);
  return pause;
}

}  // namespace walsh::client
