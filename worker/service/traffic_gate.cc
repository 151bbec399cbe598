#include "worker/service/traffic_gate.h"

#include <algorithm>
#include <utility>

#include "worker/service/job_metrics.h"

namespace walsh::service {

TrafficGate::Traffic TrafficGate::TrafficOf(engine::RequestCount* requests) {
  return {
      .n_requests = [requests] { return requests->count(); },
      .wait_until_none = [requests](absl::Duration at_most) { requests->WaitUntilNone(at_most); }};
}

TrafficGate::TrafficGate(ServeWhileQuantizing policy, Traffic traffic, const Clock* clock)
    : policy_(policy),
      traffic_(std::move(traffic)),
      clock_(clock),
      work_start_(clock->Monotonic()) {}

bool TrafficGate::IsWanted() {
  if (policy_ != ServeWhileQuantizing::kExclusive && traffic_.n_requests() > 0) return true;
  work_start_ = clock_->Monotonic();
  return false;
}

absl::Duration TrafficGate::Longest(absl::Duration work) const {
  if (policy_ == ServeWhileQuantizing::kPreempt) return absl::InfiniteDuration();
  if (work * kWaitPerWork < kWaitMin) return absl::ZeroDuration();
  return std::min(work * kWaitPerWork, kWaitMax);
}

absl::Status TrafficGate::Wait(const KeepGoing& keep_going) {
  absl::Duration now = clock_->Monotonic();
  const absl::Duration start = now;
  const absl::Duration longest = Longest(start - work_start_);
  absl::Status status;
  while (now - start < longest && traffic_.n_requests() > 0) {
    status = keep_going();
    if (!status.ok()) break;
    traffic_.wait_until_none(std::min(kAskInterval, longest - (now - start)));
    const absl::Duration before = std::exchange(now, clock_->Monotonic());
    CountYield(now - before);
  }
  if (now > start) work_start_ = now;
  return status;
}

}  // namespace walsh::service
