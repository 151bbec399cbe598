// The two kinds of waiting that tests may do; tests/tidy refuses bare sleeps elsewhere.
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace walsh::testing {

// For fakes that take their time. Never to wait until something has surely happened.
inline void Pause(absl::Duration duration) { absl::SleepFor(duration); }

// Polls every millisecond; false when `condition` has not come true within `timeout`.
template <typename Condition>
[[nodiscard]] bool WaitUntil(Condition condition, absl::Duration timeout = absl::Seconds(60)) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    Pause(absl::Milliseconds(1));
  }
  return true;
}

}  // namespace walsh::testing
