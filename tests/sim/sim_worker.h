// Workers that follow the protocol of worker/service: agent.cc, which registers, sends heartbeats
// and takes leases, and job_runner.cc, which runs a job from checkpoint to publication. The lease
// is the real HeldLease; layers are time that passes.
//
// A machine has an address and a folder of artifacts, and one process at a time. Processes are
// killed, paused as by SIGSTOP (all that would have happened happens when they wake, with the lease
// that they had), drained and started again.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "tests/sim/sim_coordinator.h"
#include "tests/sim/world.h"
#include "worker/service/held_lease.h"

namespace walsh::sim {

class WorkerMachine;

class WorkerProcess : public std::enable_shared_from_this<WorkerProcess> {
 public:
  WorkerProcess(World* world, SimCoordinator* coordinator, WorkerMachine* machine, std::string id)
      : world_(*world), coordinator_(*coordinator), machine_(*machine), id_(std::move(id)) {}

  void Start();
  void Drain();
  void Pause(absl::Duration time);
  // Nothing of it happens any more.
  void Kill() { is_dead_ = true; }
  bool is_paused() const { return world_.loop.now() < paused_until_; }
  // That it runs; empty: none.
  std::string job_id() const;
  const std::string& id() const { return id_; }
  WorkerMachine& machine() { return machine_; }
  const std::string& address() const;

 private:
  // What a thread of this process does when its time has come.
  template <typename Function>
  auto Then(Function function) {
    return [weak = weak_from_this(), function](auto... arguments) {
      if (const auto self = weak.lock()) self->Run([=] { function(arguments...); });
    };
  }
  void After(absl::Duration delay, std::function<void()> function);
  void Run(std::function<void()> function);
  void WakeUp();
  Network::Route ToCoordinator() const;

  // -- agent.cc
  void Beat();
  void Register();
  void Heartbeat();
  void OnBeat(bool ok, bool is_urgent);
  void Poke();
  void AskForJob();
  void OnLease(const absl::StatusOr<internal_v1::AcquireLeaseResponse>& answer);
  void Leave();

  // -- job_runner.cc
  void RunLease(const internal_v1::Lease& lease);
  void BeginJob();
  void RunLayer();
  void EndLayer();
  void ReportPublishing();
  void Rename();
  void Report(v1::QuantizationJob::Stage stage, double fraction,
              const std::function<void(const absl::Status&)>& done);
  void CompleteWithArtifact();
  void CompleteWithError(absl::StatusCode code, const std::string& reason, bool is_refusal);
  void Stop();
  void Deliver(const internal_v1::CompleteJobRequest& request, int attempt);
  void EndJob();
  bool must_stop() const { return !held_->Check().ok() && !held_->may_finish(); }
  internal_v1::CompleteJobRequest Completion() const;

  World& world_;
  SimCoordinator& coordinator_;
  WorkerMachine& machine_;
  const std::string id_;

  bool is_dead_ = false;
  absl::Duration paused_until_;
  std::deque<std::function<void()>> stalled_;

  bool is_registered_ = false;
  bool is_beating_ = false;
  bool is_poked_ = false;
  int64_t beat_ = 0;  // of the one that is scheduled
  bool is_draining_ = false;
  bool is_leaving_ = false;
  bool waits_for_registration_ = false;
  std::optional<int64_t> acquiring_;  // the call

  std::shared_ptr<service::HeldLease> held_;
  internal_v1::Lease lease_;
  JobPlan plan_;
  int n_layers_done_ = 0;
};

class WorkerMachine {
 public:
  WorkerMachine(World* world, SimCoordinator* coordinator, int number, bool is_big)
      : world_(*world), coordinator_(*coordinator), number_(number), is_big_(is_big) {}

  void Start();
  // The process dies, and another one is started later.
  void Kill();
  // The process has ended by itself.
  void OnExit();
  WorkerProcess* process() { return process_.get(); }
  const std::string& address() const { return address_; }
  bool is_big() const { return is_big_; }
  // The artifacts' folder: the job that made it, by model.
  std::map<std::string, std::string>& artifacts() { return artifacts_; }
  std::string folder() const;
  // Numbers of calls for a job; the last one's caller goes away.
  int64_t NextAcquire() { return last_acquire_ = world_.n_calls++; }
  void CancelAcquire();

 private:
  World& world_;
  SimCoordinator& coordinator_;
  const int number_;
  const bool is_big_;
  std::string address_;
  int n_starts_ = 0;
  int64_t last_acquire_ = -1;
  std::shared_ptr<WorkerProcess> process_;
  std::map<std::string, std::string> artifacts_;
};

}  // namespace walsh::sim
