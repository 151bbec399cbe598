#include "worker/service/agent.h"

#include <grpcpp/client_context.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/version.h"
#include "worker/service/host_memory.h"
#include "worker/service/proto_time.h"

namespace walsh::service {
namespace {

// How long a lease is waited for in one call.
constexpr absl::Duration kLeaseWait = absl::Seconds(20);
constexpr absl::Duration kCallTimeout = absl::Seconds(5);
constexpr absl::Duration kRetryFirst = absl::Milliseconds(200);
constexpr absl::Duration kRetryMax = absl::Seconds(5);

void SetTimeout(grpc::ClientContext& context, absl::Duration timeout) {
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(timeout));
}

// Doubles up to a ceiling, ±25 % so that a fleet does not come back in step.
class Backoff {
 public:
  absl::Duration Next() {
    const absl::Duration delay = next_ * std::uniform_real_distribution<double>(0.75, 1.25)(rng_);
    next_ = std::min(next_ * 2, kRetryMax);
    return delay;
  }
  void Reset() { next_ = kRetryFirst; }

 private:
  std::minstd_rand rng_{std::random_device{}()};
  absl::Duration next_ = kRetryFirst;
};

}  // namespace

Agent::Agent(Identity identity, CoordinatorLink* coordinator, Hooks hooks, Clock* clock)
    : identity_(std::move(identity)),
      coordinator_(*coordinator),
      hooks_(std::move(hooks)),
      clock_(clock) {}

Agent::~Agent() {
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = is_leasing_over_ = true;
    if (lease_ != nullptr) lease_->HandBack();
    if (waiting_for_lease_ != nullptr) waiting_for_lease_->TryCancel();
  }
  changed_.notify_all();
  if (lease_thread_.joinable()) lease_thread_.join();
  if (heartbeat_thread_.joinable()) heartbeat_thread_.join();
}

void Agent::Start() {
  heartbeat_thread_ = std::thread([this] { HeartbeatLoop(); });
  lease_thread_ = std::thread([this] { LeaseLoop(); });
}

void Agent::Poke() {
  const std::lock_guard lock(mu_);
  is_poked_ = true;
  changed_.notify_all();
}

void Agent::Drain() {
  const std::lock_guard lock(mu_);
  is_draining_ = is_leasing_over_ = is_poked_ = true;
  if (waiting_for_lease_ != nullptr) waiting_for_lease_->TryCancel();
  changed_.notify_all();
}

void Agent::HandBack(absl::Duration grace) {
  const std::lock_guard lock(mu_);
  if (lease_ != nullptr) lease_->HandBack(grace);
}

void Agent::AwaitArrivals() {
  if (!is_registered()) return;
  grpc::ClientContext context;
  SetTimeout(context, kCallTimeout);
  internal::v1::DrainRequest request;
  request.set_worker_id(identity_.worker_id);
  google::protobuf::Empty response;
  if (const grpc::Status status = coordinator_->Drain(&context, request, &response); !status.ok()) {
    WALSH_LOG(Warning, "the coordinator may still send requests",
              {"error", FromGrpcStatus(status)});
  }
}

void Agent::Stop() {
  Drain();
  HandBack(absl::ZeroDuration());
  // Heartbeats go on until the job has stopped and said so.
  if (lease_thread_.joinable()) lease_thread_.join();
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  if (heartbeat_thread_.joinable()) heartbeat_thread_.join();
  if (!is_registered()) return;
  grpc::ClientContext context;
  SetTimeout(context, kCallTimeout);
  internal::v1::DeregisterRequest request;
  request.set_worker_id(identity_.worker_id);
  google::protobuf::Empty response;
  if (const grpc::Status status = coordinator_->Deregister(&context, request, &response);
      !status.ok()) {
    WALSH_LOG(Warning, "no goodbye to the coordinator", {"error", FromGrpcStatus(status)});
  }
}

bool Agent::is_registered() const {
  const std::lock_guard lock(mu_);
  return is_registered_;
}

bool Agent::Wait(std::unique_lock<std::mutex>& lock, absl::Duration d) {
  changed_.wait_for(lock, absl::ToChronoMicroseconds(d), [this] { return is_stopping_; });
  return is_stopping_;
}

void Agent::HeartbeatLoop() {
  Backoff backoff;
  std::unique_lock lock(mu_);
  while (!is_stopping_) {
    const bool was_registered = is_registered_;
    is_poked_ = false;
    lock.unlock();
    const bool ok = was_registered ? Heartbeat() : Register();
    lock.lock();
    if (!ok) {
      if (Wait(lock, backoff.Next())) return;
      continue;
    }
    backoff.Reset();
    if (!was_registered) continue;  // the first heartbeat follows at once and confirms a lease
    changed_.wait_for(lock, absl::ToChronoMicroseconds(heartbeat_interval_),
                      [this] { return is_stopping_ || is_poked_; });
  }
}

bool Agent::Register() {
  const Load load = hooks_.load();
  internal::v1::RegisterRequest request;
  request.set_worker_id(identity_.worker_id);
  request.set_address(identity_.address);
  request.set_version(std::string(Version()));
  request.set_device(identity_.device);
  request.mutable_models()->Add(load.models.begin(), load.models.end());
  request.set_memory_bytes_total(ReadHostMemory().total_bytes);
  request.set_host_pid(getpid());
  request.set_has_artifact_store(identity_.has_artifact_store);
  {
    const std::lock_guard lock(mu_);
    request.set_draining(is_draining_);
  }
  internal::v1::RegisterResponse response;
  grpc::ClientContext context;
  SetTimeout(context, kCallTimeout);
  const grpc::Status status = coordinator_->Register(&context, request, &response);
  if (!status.ok()) {
    WALSH_LOG(Warning, "the coordinator does not take the registration",
              {"error", FromGrpcStatus(status)});
    return false;
  }
  const std::lock_guard lock(mu_);
  is_registered_ = true;
  if (response.has_heartbeat_interval()) {
    heartbeat_interval_ =
        std::max(FromProto(response.heartbeat_interval()), absl::Milliseconds(10));
  }
  if (response.has_lease_duration()) lease_duration_ = FromProto(response.lease_duration());
  WALSH_LOG(Info, "registered", {"worker", identity_.worker_id}, {"address", identity_.address});
  changed_.notify_all();
  return true;
}

bool Agent::Heartbeat() {
  const Load load = hooks_.load();
  internal::v1::HeartbeatRequest request;
  std::shared_ptr<HeldLease> lease;
  {
    const std::lock_guard lock(mu_);
    lease = lease_;
    request.set_draining(is_draining_);
  }
  request.set_worker_id(identity_.worker_id);
  if (lease != nullptr) {
    request.set_job_name(lease->job_name());
    request.set_fencing_token(lease->fencing_token());
  }
  request.mutable_models()->Add(load.models.begin(), load.models.end());
  request.set_models_revision(load.models_revision);
  request.set_requests_running(load.requests_running);
  request.set_requests_waiting(load.requests_waiting);
  request.set_memory_bytes_free(ReadHostMemory().free_bytes);
  internal::v1::HeartbeatResponse response;
  grpc::ClientContext context;
  SetTimeout(context, kCallTimeout);
  const absl::Duration sent = clock_->Monotonic();
  const grpc::Status status = coordinator_->Heartbeat(&context, request, &response);
  if (!status.ok()) {
    WALSH_LOG(Warning, "heartbeat failed", {"error", FromGrpcStatus(status)});
    if (status.error_code() != grpc::StatusCode::NOT_FOUND) return false;
    const std::lock_guard lock(mu_);
    is_registered_ = false;
    return true;  // register at once
  }
  if (lease != nullptr) {
    if (!response.lease_valid()) {
      lease->Lose("the coordinator does not confirm it");
    } else {
      const std::lock_guard lock(mu_);
      lease->Prolong(sent, lease_duration_);
    }
    if (response.cancel_job()) lease->Cancel();
  }
  return true;
}

bool Agent::MayAsk(std::unique_lock<std::mutex>& lock) {
  if (hooks_.exclusive == nullptr) return true;
  lock.unlock();
  const bool may_ask = hooks_.exclusive->BeginAsking(ExclusiveUse::kLeaseWait);
  lock.lock();
  if (may_ask) {
    is_held_up_ = false;
    if (is_leasing_over_) hooks_.exclusive->EndJob();
    return !is_leasing_over_;
  }
  if (!std::exchange(is_held_up_, true)) {
    WALSH_LOG(Info, "no job is asked for while a model is loaded (exclusive)");
  }
  return false;
}

void Agent::LeaseLoop() {
  Backoff backoff;
  std::unique_lock lock(mu_);
  while (!is_leasing_over_) {
    if (!is_registered_) {
      changed_.wait(lock, [this] { return is_registered_ || is_leasing_over_; });
      continue;
    }
    if (!MayAsk(lock)) continue;
    const absl::Duration wait = hooks_.exclusive == nullptr ? kLeaseWait : ExclusiveUse::kLeaseWait;
    grpc::ClientContext context;
    SetTimeout(context, wait + kCallTimeout);
    waiting_for_lease_ = &context;
    lock.unlock();
    internal::v1::AcquireLeaseRequest request;
    request.set_worker_id(identity_.worker_id);
    *request.mutable_wait() = ToProto(wait);
    internal::v1::AcquireLeaseResponse response;
    const grpc::Status status = coordinator_->AcquireLease(&context, request, &response);
    lock.lock();
    waiting_for_lease_ = nullptr;
    if (hooks_.exclusive != nullptr && !(status.ok() && response.has_lease())) {
      hooks_.exclusive->EndJob();
    }
    if (status.ok()) {
      backoff.Reset();
      // Also while draining: the job then goes back at once.
      if (response.has_lease()) {
        lock.unlock();
        RunLease(response.lease());
        lock.lock();
      }
      continue;
    }
    if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
      is_registered_ = false;
      is_poked_ = true;
      changed_.notify_all();
    }
    if (!is_leasing_over_) {
      changed_.wait_for(lock, absl::ToChronoMicroseconds(backoff.Next()),
                        [this] { return is_leasing_over_; });
    }
  }
}

void Agent::RunLease(const internal::v1::Lease& granted) {
  const auto lease = std::make_shared<HeldLease>(granted.job_name(), granted.fencing_token(),
                                                 FromProto(granted.duration()), clock_);
  WALSH_LOG(Info, "job leased", {"job", granted.job_name()}, {"token", granted.fencing_token()});
  {
    const std::lock_guard lock(mu_);
    lease_ = lease;
    if (is_leasing_over_) lease->HandBack();
  }
  if (hooks_.exclusive != nullptr) hooks_.exclusive->BeginJob(granted.job_name());
  hooks_.run_job(granted, *lease);
  if (hooks_.exclusive != nullptr) hooks_.exclusive->EndJob();
  {
    const std::lock_guard lock(mu_);
    lease_ = nullptr;
  }
  Poke();
}

}  // namespace walsh::service
