// What happens next, on a clock that only moves from one event to the next.
//
// Events of the same time run in the order in which they were made. An event may run others by
// RunUntil: it waits, and the world goes on meanwhile.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/time/time.h"
#include "common/clock.h"

namespace walsh::sim {

class EventLoop {
 public:
  // `after_each` is called behind each event.
  explicit EventLoop(std::function<void()> after_each) : after_each_(std::move(after_each)) {}

  ManualClock& clock() { return clock_; }
  absl::Duration now() const { return clock_.Monotonic(); }
  int64_t n_events() const { return n_events_; }

  void After(absl::Duration delay, std::function<void()> event);
  // Runs events up to `deadline`, where the clock then stands, or until Stop.
  void RunUntil(absl::Duration deadline);
  void Stop() { is_stopped_ = true; }

 private:
  const std::function<void()> after_each_;
  ManualClock clock_;
  bool is_stopped_ = false;
  int64_t n_events_ = 0;
  int64_t n_made_ = 0;
  std::map<std::pair<absl::Duration, int64_t>, std::function<void()>> events_;
};

}  // namespace walsh::sim
