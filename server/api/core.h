// What the handlers work on; owned by the server, which outlives every call.
#pragma once

#include <atomic>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"
#include "server/access/access_control.h"
#include "server/access/running_requests.h"
#include "server/fleet/model_catalog.h"
#include "server/fleet/stream_proxy.h"
#include "server/fleet/worker_client.h"
#include "server/fleet/worker_registry.h"
#include "server/jobs/job_queue.h"

namespace walsh::api {

// Counts the streams from workers: they may end a moment after the client's stream that they fed,
// and touch the core then.
class StreamCounter {
 public:
  void Begin() {
    const absl::MutexLock lock(&mu_);
    ++n_;
  }
  void End() {
    const absl::MutexLock lock(&mu_);
    --n_;
  }
  void WaitForNone() const {
    const absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(
        +[](const int* n) { return *n == 0; }, &n_));
  }

 private:
  mutable absl::Mutex mu_;
  int n_ ABSL_GUARDED_BY(mu_) = 0;
};

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
  fleet::StreamLimits stream_limits;
  StreamCounter streams;
  access::RunningRequests running_requests;

  // Set once, when the server begins to stop: no new work, waiting calls end.
  std::atomic<bool> is_stopping{false};
};

}  // namespace walsh::api
