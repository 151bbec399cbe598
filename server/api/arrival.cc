#include "server/api/arrival.h"

namespace walsh::api {
namespace {

// A request that was sent to a worker of the same network has arrived by then.
constexpr absl::Duration kArrivalMax = absl::Seconds(1);
constexpr absl::Duration kArrivalCheck = absl::Milliseconds(10);

void Check(Core* core, const std::function<int()>& n_sent, absl::Duration start,
           absl::Duration timeout, const std::shared_ptr<Cancellation>& cancellation,
           const std::function<void(absl::Status)>& next) {
  if (cancellation->cancelled()) return next(absl::CancelledError("nobody waits any more"));
  const absl::Duration waited = core->clock->Monotonic() - start;
  if (waited >= timeout) {
    return next(absl::DeadlineExceededError("requests to the worker are still on their way"));
  }
  if (n_sent() == 0 || waited >= kArrivalMax) return next(absl::OkStatus());
  core->executor->PostAfter(kArrivalCheck,
                            [=] { Check(core, n_sent, start, timeout, cancellation, next); });
}

}  // namespace

void AfterArrival(Core* core, const std::function<int()>& n_sent, absl::Duration timeout,
                  const std::shared_ptr<Cancellation>& cancellation,
                  const std::function<void(absl::Status)>& next) {
  Check(core, n_sent, core->clock->Monotonic(), timeout, cancellation, next);
}

}  // namespace walsh::api
