// What the handlers work on; owned by the server, which outlives every call.
#pragma once

#include <atomic>

#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"
#include "server/access/access_control.h"
#include "server/access/running_requests.h"
#include "server/fleet/forwarded_calls.h"
#include "server/fleet/model_catalog.h"
#include "server/fleet/stream_proxy.h"
#include "server/fleet/worker_client.h"
#include "server/fleet/worker_registry.h"
#include "server/jobs/job_queue.h"

namespace walsh::api {

struct Core {
  Executor* executor;
  const Clock* clock;
  const access::AccessControl* access;
  jobs::JobQueue* queue;
  fleet::WorkerRegistry* registry;
  fleet::ModelCatalog* catalog;
  fleet::WorkerClients* clients;

  absl::Duration lease_duration = absl::Seconds(30);
  absl::Duration heartbeat_interval = absl::Seconds(10);
  // A watcher hears something at least this often.
  absl::Duration watch_heartbeat = absl::Seconds(10);
  // Workers are asked about a new job for so long in all.
  absl::Duration validation_max = absl::Seconds(20);
  // Of a call that is answered here, when its client names no deadline.
  absl::Duration call_timeout = absl::Seconds(10);
  fleet::StreamLimits stream_limits;
  access::RunningRequests running_requests;
  // They may end a moment after the client's call that they fed, and touch the core then.
  fleet::ForwardedCalls calls;

  // Set once, when the server begins to stop: no new work, waiting calls end.
  std::atomic<bool> is_stopping{false};
};

}  // namespace walsh::api
