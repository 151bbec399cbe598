#include "tests/sim/event_loop.h"

#include <algorithm>

namespace walsh::sim {

void EventLoop::After(absl::Duration delay, std::function<void()> event) {
  events_.emplace(std::pair(now() + std::max(delay, absl::ZeroDuration()), n_made_++),
                  std::move(event));
}

void EventLoop::RunUntil(absl::Duration deadline) {
  while (!is_stopped_ && !events_.empty() && events_.begin()->first.first <= deadline) {
    auto next = events_.extract(events_.begin());
    clock_.Advance(next.key().first - now());
    ++n_events_;
    next.mapped()();
    after_each_();
  }
  if (!is_stopped_) clock_.Advance(std::max(deadline - now(), absl::ZeroDuration()));
}

}  // namespace walsh::sim
