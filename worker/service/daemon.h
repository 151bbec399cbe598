// walsh-worker: what is built in which order, and taken down in which.
//
// Up:   data folder (locked: one worker each), model store, gRPC port, metrics port, endpoints
//       file, agent, models to load.
// Down: health says NOT_SERVING, no new leases; a running job goes back to the queue and running
//       requests finish, side by side and within the shutdown timeout; goodbye to the coordinator;
//       ports close.
//
// Errors: FAILED_PRECONDITION when another worker uses the data folder; those of binding ports
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/service/options.h"

namespace walsh::service {

class Daemon {
 public:
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const WorkerOptions& options);
  virtual ~Daemon() = default;
  // Drains and says goodbye; returns when everything is down.
  virtual void Stop() = 0;
};

// Runs the daemon until SIGTERM or SIGINT, then stops it; a second signal leaves at once. The
// process's exit code.
int RunUntilSignal(const WorkerOptions& options);

}  // namespace walsh::service
