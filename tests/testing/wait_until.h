// Waiting for something that another thread or process does, instead of sleeping and hoping.
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace walsh::testing {

// Asks until `predicate` holds; false when it still does not after `timeout`.
template <typename Predicate>
bool WaitUntil(const Predicate& predicate, absl::Duration timeout = absl::Seconds(10)) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!predicate()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

}  // namespace walsh::testing
