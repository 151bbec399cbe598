// Waits for requests that are on their way to a worker: it lets those that it has accepted end, and
// refuses what comes after.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/grpc_cancellation.h"
#include "server/api/core.h"

namespace walsh::api {

// No more may be sent when this is called. Waits until all that were sent (`n_sent` counts those
// that have not ended) have ended, or have had the time to arrive. `next` gets OK on the calling
// thread or the executor's, or what ended the wait: CANCELLED, or DEADLINE_EXCEEDED after
// `timeout`.
void AfterArrival(Core* core, const std::function<int()>& n_sent, absl::Duration timeout,
                  const std::shared_ptr<Cancellation>& cancellation,
                  const std::function<void(absl::Status)>& next);

}  // namespace walsh::api
