// The worker's side of the protocol with the coordinator: registers, sends heartbeats, takes
// leases.
//
// Two threads. One registers and then sends a heartbeat per interval, so that long work never
// delays them; it registers again whenever the coordinator does not know this worker (it
// restarted), and learns from the answers that a lease is lost or a job cancelled. The other waits
// for leases and runs each job itself, one at a time. A worker that takes no job for a while does
// not ask for one, and tells nobody: to the coordinator it is as busy as with a job.
//
// Threads: all public methods are safe from any thread.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "common/clock.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "worker/service/coordinator_link.h"
#include "worker/service/exclusive_use.h"
#include "worker/service/held_lease.h"

namespace grpc {
class ClientContext;
}

namespace walsh::service {

class Agent {
 public:
  struct Identity {
    std::string worker_id;
    std::string address;  // host:port where the coordinator reaches this worker
    std::string device;
    bool has_artifact_store = false;
  };
  // What heartbeats tell about the rest of the worker.
  struct Load {
    std::vector<v1::Model> models;
    int64_t models_revision = 0;
    int requests_running = 0;
    int requests_waiting = 0;
  };
  struct Hooks {
    std::function<Load()> load;
    // Runs a leased job to its end, with all reports to the coordinator.
    std::function<void(const internal::v1::Lease&, HeldLease&)> run_job;
    // Jobs are asked for only when it allows it; null: always. Outlives the agent.
    ExclusiveUse* exclusive = nullptr;
  };

  Agent(Identity identity, CoordinatorLink* coordinator, Hooks hooks, Clock* clock);
  // Stops without a goodbye, unless Stop was called.
  ~Agent();

  void Start();
  // Makes the next heartbeat go out at once: a model was loaded, unloaded or published.
  void Poke();
  // Tells the coordinator that this worker takes no new work, and takes no new lease.
  void Drain();
  // After Drain(): the job that runs stops and goes back to the queue, beside what follows. It may
  // finish a layer that is kept for whoever goes on, for at most `grace` of the first call.
  void HandBack(absl::Duration grace);
  // After Drain(): returns when the coordinator sends no request any more and those that it has
  // sent have arrived, or when it does not say so for some seconds.
  void AwaitArrivals();
  // Drains, hands a held lease back, waits for its job to stop, and says goodbye.
  void Stop();
  bool is_registered() const;

 private:
  void HeartbeatLoop();
  void LeaseLoop();
  bool Register();
  // False when it should be tried again soon.
  bool Heartbeat();
  // Whether a job may be asked for now.
  bool MayAsk(std::unique_lock<std::mutex>& lock);
  void RunLease(const internal::v1::Lease& lease);
  // Sleeps for at most `d`; less when woken. True when stopping.
  bool Wait(std::unique_lock<std::mutex>& lock, absl::Duration d);

  const Identity identity_;
  CoordinatorLink& coordinator_;
  const Hooks hooks_;
  Clock* const clock_;

  mutable std::mutex mu_;
  std::condition_variable changed_;
  bool is_registered_ = false;
  bool is_poked_ = false;
  bool is_draining_ = false;
  bool is_leasing_over_ = false;  // no new lease is asked for
  bool is_held_up_ = false;       // by a model, which has been said
  bool is_stopping_ = false;
  absl::Duration heartbeat_interval_ = absl::Seconds(1);
  absl::Duration lease_duration_ = absl::Seconds(30);
  std::shared_ptr<HeldLease> lease_;
  grpc::ClientContext* waiting_for_lease_ = nullptr;

  std::thread heartbeat_thread_;
  std::thread lease_thread_;
};

}  // namespace walsh::service
