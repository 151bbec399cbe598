// walsh-worker: what is built in which order, and taken down in which.
//
// Up:   data folder (locked: one worker each), device of the jobs, model store, gRPC port, metrics
//       port, endpoints file, agent, models to load.
// Down: health says NOT_SERVING, no new leases, and a running job goes back to the queue, beside
//       what follows; the coordinator is told, and what it has sent arrives; from then on requests
//       are refused, and those that run finish within the shutdown timeout, which counts from the
//       start; goodbye to the coordinator; ports close.
//
// A broken device (worker/kernels/device_failure.h) stops the worker in the same order, with an
// exit code of its own: only a new process has a sound device.
//
// Errors: FAILED_PRECONDITION when another worker uses the data folder or the device that --device
//         names cannot be used; those of binding ports
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/service/job_device.h"
#include "worker/service/options.h"

namespace walsh::service {

// After a broken device; EX_SOFTWARE of sysexits.h.
inline constexpr int kExitDeviceBroken = 70;

// What surrounds a daemon.
struct Surroundings {
  CudaDevices cuda;
  // The worker can run no more jobs and must be stopped. Called once at most, on any thread but
  // not from inside Stop().
  std::function<void()> on_device_broken;
};

class Daemon {
 public:
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const WorkerOptions& options,
                                                       const Surroundings& surroundings);
  virtual ~Daemon() = default;
  // Drains and says goodbye; returns when everything is down.
  virtual void Stop() = 0;
};

// Runs the daemon until SIGTERM, SIGINT or a broken device, then stops it; a second signal leaves
// at once. The process's exit code.
int RunUntilSignal(const WorkerOptions& options, const CudaDevices& cuda);

}  // namespace walsh::service
