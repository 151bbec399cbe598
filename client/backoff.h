// Pauses between attempts: exponential, with jitter, so that clients that lost one server together
// do not come back together.
#pragma once

#include <random>

#include "absl/time/time.h"

namespace walsh::client {

class Backoff {
 public:
  struct Options {
    absl::Duration initial = absl::Milliseconds(100);
    absl::Duration max = absl::Seconds(5);
    double multiplier = 2.0;
    double jitter = 0.2;  // each pause is scaled by a factor drawn from [1 - jitter, 1 + jitter]
  };

  Backoff(const Options& options, uint64_t seed) : options_(options), random_(seed) { Reset(); }
  // The pause before the next attempt.
  absl::Duration Next();
  // After success: the next pause is the initial one again.
  void Reset() { next_ = options_.initial; }

 private:
  const Options options_;
  std::mt19937_64 random_;
  absl::Duration next_;
};

}  // namespace walsh::client
