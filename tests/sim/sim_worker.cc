#include "tests/sim/sim_worker.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"

namespace walsh::sim {
namespace {

using v1::QuantizationJob;

// As in worker/service.
constexpr absl::Duration kLeaseWait = absl::Seconds(20);
constexpr absl::Duration kCallTimeout = absl::Seconds(5);
constexpr absl::Duration kRetryFirst = absl::Milliseconds(200);
constexpr absl::Duration kRetryMax = absl::Seconds(5);
constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);
constexpr int kHandBackTries = 3;

constexpr absl::Duration kDrainGrace = absl::Seconds(20);
constexpr absl::Duration kPauseMax = absl::Seconds(90);
constexpr absl::Duration kRenameMax = absl::Milliseconds(50);
constexpr absl::Duration kRestartMin = absl::Milliseconds(500);
constexpr absl::Duration kRestartMax = absl::Seconds(60);
// Of restarts: the machine is replaced, and nobody knows that it was that worker's.
constexpr double kNewAddresses = 0.2;

bool MayPass(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsResourceExhausted(status) || ErrorReason(status) == "WORKER_UNKNOWN";
}

std::string JobId(const std::string& job_name) { return job_name.substr(kJobCollection.size()); }

}  // namespace

// -- The process

std::string WorkerProcess::job_id() const {
  return held_ == nullptr ? "" : JobId(held_->job_name());
}

const std::string& WorkerProcess::address() const { return machine_.address(); }

void WorkerProcess::Start() {
  Beat();
  AskForJob();
}

void WorkerProcess::Run(std::function<void()> function) {
  if (is_dead_) return;
  if (is_paused()) {
    stalled_.push_back(std::move(function));
  } else {
    function();
  }
}

void WorkerProcess::After(absl::Duration delay, std::function<void()> function) {
  world_.loop.After(delay, Then(std::move(function)));
}

void WorkerProcess::Pause(absl::Duration time) {
  world_.history.Note(absl::StrCat(id_, ": paused for ", absl::FormatDuration(time)));
  paused_until_ = world_.loop.now() + time;
  world_.loop.After(time, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->WakeUp();
  });
}

void WorkerProcess::WakeUp() {
  if (is_paused()) return;
  for (std::function<void()>& function : std::exchange(stalled_, {})) Run(std::move(function));
}

Network::Route WorkerProcess::ToCoordinator() const {
  return {.from = address(), .to = kCoordinator, .job = job_id()};
}

// -- agent.cc

void WorkerProcess::Beat() {
  if (is_leaving_ || is_beating_) return;
  is_beating_ = true;
  is_poked_ = false;
  ++beat_;
  is_registered_ ? Heartbeat() : Register();
}

void WorkerProcess::Register() {
  internal_v1::RegisterRequest request;
  request.set_worker_id(id_);
  request.set_address(address());
  request.set_draining(is_draining_);
  world_.network.Call<internal_v1::RegisterResponse>(
      ToCoordinator(), kCallTimeout,
      [&coordinator = coordinator_, request](const auto& reply) {
        coordinator.Register(request, reply);
      },
      Then([this](const absl::StatusOr<internal_v1::RegisterResponse>& answer) {
        is_registered_ = answer.ok();
        if (is_registered_ && std::exchange(waits_for_registration_, false)) AskForJob();
        OnBeat(answer.ok(), /*is_urgent=*/true);  // the first heartbeat confirms a lease
      }));
}

void WorkerProcess::Heartbeat() {
  internal_v1::HeartbeatRequest request;
  request.set_worker_id(id_);
  request.set_draining(is_draining_);
  if (held_ != nullptr) {
    request.set_job_name(held_->job_name());
    request.set_fencing_token(held_->fencing_token());
  }
  world_.network.Call<internal_v1::HeartbeatResponse>(
      ToCoordinator(), kCallTimeout,
      [&coordinator = coordinator_, request](const auto& reply) {
        coordinator.Heartbeat(request, reply);
      },
      Then([this, held = held_, sent = world_.loop.now()](
               const absl::StatusOr<internal_v1::HeartbeatResponse>& answer) {
        if (!answer.ok()) {
          const bool is_unknown = absl::IsNotFound(answer.status());
          if (is_unknown) is_registered_ = false;
          return OnBeat(is_unknown, /*is_urgent=*/true);
        }
        if (held != nullptr) {
          if (answer->lease_valid()) {
            held->Prolong(sent, kLeaseDuration);
          } else {
            held->Lose("the coordinator does not confirm it");
          }
          if (answer->cancel_job()) held->Cancel();
        }
        OnBeat(/*ok=*/true, /*is_urgent=*/false);
      }));
}

void WorkerProcess::OnBeat(bool ok, bool is_urgent) {
  is_beating_ = false;
  if (ok && (is_urgent || is_poked_)) return Beat();
  const absl::Duration delay =
      ok ? kHeartbeatInterval : world_.random.Between(kRetryFirst, kRetryMax);
  After(delay, [this, beat = beat_] {
    if (beat == beat_) Beat();
  });
}

void WorkerProcess::Poke() {
  is_poked_ = true;
  Beat();
}

void WorkerProcess::AskForJob() {
  if (is_draining_) return Leave();
  if (!is_registered_) {
    waits_for_registration_ = true;
    return;
  }
  internal_v1::AcquireLeaseRequest request;
  request.set_worker_id(id_);
  const int64_t call = machine_.NextAcquire();
  acquiring_ = call;
  world_.network.Call<internal_v1::AcquireLeaseResponse>(
      ToCoordinator(), kLeaseWait + kCallTimeout,
      [&coordinator = coordinator_, call, request](const auto& reply) {
        coordinator.AcquireLease(call, request, reply);
      },
      Then([this, call](const absl::StatusOr<internal_v1::AcquireLeaseResponse>& answer) {
        if (acquiring_ != call) return;  // given up
        acquiring_.reset();
        OnLease(answer);
      }));
}

void WorkerProcess::OnLease(const absl::StatusOr<internal_v1::AcquireLeaseResponse>& answer) {
  if (answer.ok()) {
    if (answer->has_lease()) return RunLease(answer->lease());
    return AskForJob();
  }
  if (absl::IsDeadlineExceeded(answer.status())) machine_.CancelAcquire();
  if (absl::IsNotFound(answer.status())) {
    is_registered_ = false;
    Poke();
  }
  After(world_.random.Between(kRetryFirst, kRetryMax), [this] { AskForJob(); });
}

void WorkerProcess::Drain() {
  Run([this] {
    if (std::exchange(is_draining_, true)) return;
    world_.history.Note(absl::StrCat(id_, ": drains"));
    Poke();
    if (held_ != nullptr) return held_->HandBack(kDrainGrace);
    if (acquiring_.has_value()) {
      machine_.CancelAcquire();
      acquiring_.reset();
      Leave();
    } else if (waits_for_registration_) {
      Leave();
    }
  });
}

void WorkerProcess::Leave() {
  if (std::exchange(is_leaving_, true)) return;
  if (!is_registered_) return machine_.OnExit();
  internal_v1::DeregisterRequest request;
  request.set_worker_id(id_);
  world_.network.Call<Empty>(
      ToCoordinator(), kCallTimeout,
      [&coordinator = coordinator_, request](const auto& reply) {
        coordinator.Deregister(request, reply);
      },
      Then([this](const absl::StatusOr<Empty>&) { machine_.OnExit(); }));
}

// -- job_runner.cc

void WorkerProcess::RunLease(const internal_v1::Lease& lease) {
  world_.history.Note(
      absl::StrCat(id_, ": has ", lease.job_name(), " token ", lease.fencing_token()));
  held_ = std::make_shared<service::HeldLease>(lease.job_name(), lease.fencing_token(),
                                               kLeaseDuration, &world_.loop.clock());
  lease_ = lease;
  plan_ = world_.history.PlanOf(lease.job().model_name());
  n_layers_done_ = 0;
  if (is_draining_) held_->HandBack();
  After(absl::Milliseconds(10), [this] { BeginJob(); });
}

void WorkerProcess::BeginJob() {
  if (machine_.artifacts().contains(lease_.job().model_name())) return CompleteWithArtifact();
  if (must_stop()) return Stop();
  if (plan_.kind == JobPlan::Kind::kNeedsBigWorker && !machine_.is_big()) {
    world_.faults.Count(Fault::kRefusal, world_.history.PhaseOfJob(job_id()));
    return CompleteWithError(absl::StatusCode::kResourceExhausted, "INSUFFICIENT_MEMORY",
                             /*is_refusal=*/true);
  }
  Checkpoint& checkpoint = world_.checkpoints[job_id()];
  if (held_->fencing_token() < checkpoint.token) {
    held_->Lose("another has claimed the checkpoint");
    return Stop();
  }
  checkpoint.token = held_->fencing_token();
  n_layers_done_ = checkpoint.n_layers;
  RunLayer();
}

void WorkerProcess::RunLayer() {
  if (!held_->Check().ok()) return Stop();
  if (n_layers_done_ >= plan_.n_layers) return ReportPublishing();
  Report(QuantizationJob::QUANTIZING, 0, [](const absl::Status&) {});
  const bool kills =
      plan_.kind == JobPlan::Kind::kKillsWorker && n_layers_done_ == plan_.failing_layer;
  if (kills) {
    return After(plan_.layer_time / 2, [this] {
      world_.faults.Count(Fault::kJobKillsWorker, world_.history.PhaseOfJob(job_id()));
      machine_.Kill();
    });
  }
  After(plan_.layer_time / 2, [this] {
    if (must_stop()) return Stop();
    Report(QuantizationJob::QUANTIZING, 0.5, [](const absl::Status&) {});
    After(plan_.layer_time / 2, [this] { EndLayer(); });
  });
}

void WorkerProcess::EndLayer() {
  if (must_stop()) return Stop();
  const bool is_last_straw = n_layers_done_ == plan_.failing_layer;
  if (plan_.kind == JobPlan::Kind::kFailsForEver && is_last_straw) {
    world_.faults.Count(Fault::kFailureForEver, world_.history.PhaseOfJob(job_id()));
    return CompleteWithError(absl::StatusCode::kInvalidArgument, "PLANNED", /*is_refusal=*/false);
  }
  int& n_failures = world_.failures[lease_.job().model_name()];
  if (plan_.kind == JobPlan::Kind::kMayPass && is_last_straw && n_failures < plan_.n_failures) {
    ++n_failures;
    world_.faults.Count(Fault::kFailureThatMayPass, world_.history.PhaseOfJob(job_id()));
    return CompleteWithError(absl::StatusCode::kUnavailable, "PLANNED", /*is_refusal=*/false);
  }
  Checkpoint& checkpoint = world_.checkpoints[job_id()];
  if (held_->fencing_token() < checkpoint.token) {
    held_->Lose("another has claimed the checkpoint");
    return Stop();
  }
  checkpoint.n_layers = ++n_layers_done_;
  world_.history.OnCheckpoint(WorkerName(id_), job_id(), held_->fencing_token(), n_layers_done_);
  RunLayer();
}

void WorkerProcess::Report(QuantizationJob::Stage stage, double fraction,
                           const std::function<void(const absl::Status&)>& done) {
  internal_v1::ReportProgressRequest request;
  request.set_worker_id(id_);
  request.set_job_name(held_->job_name());
  request.set_fencing_token(held_->fencing_token());
  v1::QuantizationJobEvent& event = *request.mutable_event();
  event.set_stage(stage);
  event.set_layer(n_layers_done_);
  event.mutable_progress()->set_layers_total(plan_.n_layers);
  event.mutable_progress()->set_layers_done(n_layers_done_);
  event.mutable_progress()->set_fraction((n_layers_done_ + fraction) / (plan_.n_layers + 1));
  world_.network.Call<Empty>(
      ToCoordinator(), kCallTimeout,
      [&coordinator = coordinator_, request](const auto& reply) {
        coordinator.ReportProgress(request, reply);
      },
      Then([held = held_, done](const absl::StatusOr<Empty>& answer) {
        if (absl::IsAborted(answer.status())) held->Lose(std::string(answer.status().message()));
        done(answer.status());
      }));
}

void WorkerProcess::ReportPublishing() {
  if (!held_->Check().ok()) return Stop();
  Report(QuantizationJob::PUBLISHING, 1, [this](const absl::Status& status) {
    if (status.ok() && held_->Check().ok()) {
      if (world_.random.Chance(world_.pauses_in_rename)) {
        world_.faults.Count(Fault::kPausedInRename, world_.history.PhaseOfJob(job_id()));
        Pause(world_.random.Between(absl::Seconds(1), kPauseMax));
      }
      return After(world_.random.Between(absl::ZeroDuration(), kRenameMax), [this] { Rename(); });
    }
    if (absl::IsFailedPrecondition(status)) held_->Cancel();
    if (!held_->Check().ok()) return Stop();
    if (!MayPass(status)) {
      return CompleteWithError(status.code(), "PUBLISHING_REFUSED", /*is_refusal=*/false);
    }
    After(kRetryDelay, [this] { ReportPublishing(); });
  });
}

void WorkerProcess::Rename() {
  machine_.artifacts()[lease_.job().model_name()] = lease_.job_name();
  world_.history.OnRename(machine_.folder(), WorkerName(id_), job_id(), held_->fencing_token());
  CompleteWithArtifact();
}

internal_v1::CompleteJobRequest WorkerProcess::Completion() const {
  internal_v1::CompleteJobRequest request;
  request.set_worker_id(id_);
  request.set_job_name(held_->job_name());
  request.set_fencing_token(held_->fencing_token());
  return request;
}

void WorkerProcess::CompleteWithArtifact() {
  internal_v1::CompleteJobRequest request = Completion();
  request.mutable_result()->set_artifact_uri(ModelName(lease_.job().model_name()));
  request.mutable_model()->set_name(ModelName(lease_.job().model_name()));
  request.mutable_model()->set_quantization_job(lease_.job_name());
  world_.history.OnResult(WorkerName(id_), job_id());
  Deliver(request, 1);
}

void WorkerProcess::CompleteWithError(absl::StatusCode code, const std::string& reason,
                                      bool is_refusal) {
  if (!held_->Check().ok()) return Stop();
  internal_v1::CompleteJobRequest request = Completion();
  request.mutable_error()->set_code(static_cast<int>(code));
  request.mutable_error()->set_message(reason);
  request.set_error_reason(reason);
  request.set_refused(is_refusal);
  Deliver(request, 1);
}

// The lease says why.
void WorkerProcess::Stop() {
  const absl::Status why = held_->Check();
  if (absl::IsAborted(why)) return EndJob();
  internal_v1::CompleteJobRequest request = Completion();
  if (absl::IsCancelled(why)) {
    request.mutable_cancelled();
  } else {
    request.mutable_returned();
  }
  Deliver(request, 1);
}

void WorkerProcess::Deliver(const internal_v1::CompleteJobRequest& request, int attempt) {
  if (held_->is_lost()) return EndJob();
  world_.network.Call<Empty>(
      ToCoordinator(), kCallTimeout,
      [&coordinator = coordinator_, request](const auto& reply) {
        coordinator.CompleteJob(request, reply);
      },
      Then([this, request, attempt](const absl::StatusOr<Empty>& answer) {
        if (answer.ok() || absl::IsAborted(answer.status())) return EndJob();
        if (MayPass(answer.status())) {
          if (request.has_returned() && attempt >= kHandBackTries) return EndJob();
          return After(kRetryDelay, [this, request, attempt] { Deliver(request, attempt + 1); });
        }
        if (!request.has_result()) return EndJob();
        CompleteWithError(answer.status().code(), "OUTCOME_REFUSED", /*is_refusal=*/false);
      }));
}

void WorkerProcess::EndJob() {
  held_ = nullptr;
  Poke();
  AskForJob();
}

// -- The machine

std::string WorkerMachine::folder() const { return absl::StrCat("machine-", number_); }

void WorkerMachine::Start() {
  if (process_ != nullptr) return;
  ++n_starts_;
  const bool has_moved = n_starts_ > 1 && world_.random.Chance(kNewAddresses);
  if (n_starts_ == 1 || has_moved) address_ = absl::StrCat("host-", number_, "-", n_starts_);
  const std::string id = absl::StrCat("w", number_, "-", n_starts_);
  world_.history.Note(absl::StrCat(id, ": starts at ", address_));
  process_ = std::make_shared<WorkerProcess>(&world_, &coordinator_, this, id);
  process_->Start();
}

void WorkerMachine::Kill() {
  if (process_ == nullptr) return;
  world_.history.Note(absl::StrCat(process_->id(), ": is killed"));
  process_->Kill();
  CancelAcquire();
  OnExit();
}

void WorkerMachine::OnExit() {
  if (process_ == nullptr) return;
  process_->Kill();
  process_ = nullptr;
  world_.loop.After(world_.random.Between(kRestartMin, kRestartMax), [this] { Start(); });
}

// The coordinator sees the connection break, unless the network keeps that from it, too.
void WorkerMachine::CancelAcquire() {
  world_.network.Send({.from = address_, .to = kCoordinator, .job = ""},
                      [this, call = last_acquire_] { coordinator_.CancelAcquire(call); });
}

}  // namespace walsh::sim
