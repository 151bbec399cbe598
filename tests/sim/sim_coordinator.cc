#include "tests/sim/sim_coordinator.h"

#include <utility>
#include <vector>

#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh::sim {
namespace {

constexpr absl::Duration kTickInterval = absl::Seconds(1);
constexpr absl::Duration kAcquireWait = absl::Seconds(20);
constexpr absl::Duration kRestartMin = absl::Milliseconds(200);
constexpr absl::Duration kRestartMax = absl::Seconds(12);
// Longer than a lease, so that workers give up theirs.
constexpr absl::Duration kLongRestart = absl::Seconds(45);
constexpr double kLongRestarts = 0.1;

void SetSeconds(absl::Duration duration, google::protobuf::Duration* out) {
  out->set_seconds(absl::ToInt64Seconds(duration));
}

}  // namespace

void SimCoordinator::Start() {
  if (is_up()) return;
  ++life_;
  process_.reset(new Process{
      .store = FaultyJobStore(&world_, options_.open_disk()),
      .registry = fleet::WorkerRegistry(&world_.loop.clock(), {.offline_after = kLeaseDuration})});
  jobs::JobQueue::Options options;
  options.lease_duration = kLeaseDuration;
  options.queued_jobs_max = options_.limits.queued_jobs_max;
  auto queue = jobs::JobQueue::Open(&process_->store, &world_.loop.clock(), options, nullptr);
  if (!queue.ok()) {
    world_.history.Note("coordinator: cannot open its store");
    return ComeBackLater();
  }
  queue_ = *std::move(queue);
  world_.history.Note("coordinator: started");
  world_.history.OnCoordinatorStart();
  queue_->work_subscriptions().Add("", [this] {
    if (!std::exchange(has_work_, true))
      world_.loop.After(absl::ZeroDuration(), [this] { TryWaiters(); });
  });
  Tick(life_);
}

void SimCoordinator::Kill() {
  if (!is_up()) return;
  for (const std::string& id : world_.history.Unfinished()) {
    world_.faults.Count(Fault::kCoordinatorKilled, world_.history.PhaseOfJob(id));
  }
  process_->store.Kill();
  if (!is_busy_) Die();
}

void SimCoordinator::Die() {
  world_.history.Note("coordinator: dies");
  queue_.reset();
  backlog_.clear();
  waiters_.clear();
  has_work_ = false;
  ComeBackLater();
}

void SimCoordinator::ComeBackLater() {
  const absl::Duration delay = !world_.is_quiet && world_.random.Chance(kLongRestarts)
                                   ? kLongRestart
                                   : world_.random.Between(kRestartMin, kRestartMax);
  world_.loop.After(delay, [this] { Start(); });
}

void SimCoordinator::Serve(std::function<void()> handler) {
  if (!is_up()) return;
  backlog_.push_back(std::move(handler));
  if (!is_busy_) ServeBacklog();
}

void SimCoordinator::ServeBacklog() {
  while (is_up() && !backlog_.empty()) {
    const std::function<void()> handler = std::move(backlog_.front());
    backlog_.pop_front();
    is_busy_ = true;
    handler();
    is_busy_ = false;
    if (process_->store.is_dead()) Die();
  }
}

template <typename Response>
void SimCoordinator::Answer(const Reply<Response>& reply,
                            std::function<absl::StatusOr<Response>()> handler) {
  if (!is_up()) return reply(absl::UnavailableError("connection refused"));
  Serve([this, reply, handler = std::move(handler)] {
    absl::StatusOr<Response> answer = handler();
    if (!process_->store.is_dead()) reply(std::move(answer));
  });
}

void SimCoordinator::Tick(int64_t life) {
  if (!is_up() || life != life_) return;
  world_.loop.After(kTickInterval, [this, life] { Tick(life); });
  if (!options_.has_ticks || is_busy_) return;
  Serve([this] {
    // What a tick could not store, the next one does.
    queue_->Tick().IgnoreError();
    process_->registry.Tick();
    if (const auto workers = process_->registry.TakingJobs(); workers.has_value()) {
      world_.history.OnWorkers(*workers);
      queue_->FailRefusedByAll(*workers).IgnoreError();
    }
  });
}

void SimCoordinator::Register(const internal_v1::RegisterRequest& request,
                              const Reply<internal_v1::RegisterResponse>& reply) {
  Answer<internal_v1::RegisterResponse>(
      reply, [this, request]() -> absl::StatusOr<internal_v1::RegisterResponse> {
        WALSH_ASSIGN_OR_RETURN(const std::vector<std::string> replaced,
                               process_->registry.Register(request));
        for (const std::string& id : replaced) {
          WALSH_RETURN_IF_ERROR(queue_->LoseLease(WorkerName(id)));
        }
        internal_v1::RegisterResponse response;
        SetSeconds(kHeartbeatInterval, response.mutable_heartbeat_interval());
        SetSeconds(kLeaseDuration, response.mutable_lease_duration());
        return response;
      });
}

void SimCoordinator::AcquireLease(int64_t call, const internal_v1::AcquireLeaseRequest& request,
                                  const Reply<internal_v1::AcquireLeaseResponse>& reply) {
  if (!is_up()) return reply(absl::UnavailableError("connection refused"));
  if (const absl::Status known = process_->registry.Touch(request.worker_id()); !known.ok()) {
    return reply(known);
  }
  const int64_t number = n_waiters_++;
  waiters_[number] = {.call = call, .worker_id = request.worker_id(), .reply = reply};
  world_.loop.After(kAcquireWait, [this, number] {
    const auto it = waiters_.find(number);
    if (it == waiters_.end()) return;
    it->second.is_over = true;
    TryWaiter(number);
  });
  TryWaiter(number);
}

void SimCoordinator::CancelAcquire(int64_t call) {
  std::erase_if(waiters_, [&](const auto& waiter) { return waiter.second.call == call; });
}

// In any order: each has a thread of its own that comes when it comes.
void SimCoordinator::TryWaiters() {
  has_work_ = false;
  std::vector<int64_t> numbers;
  for (const auto& [number, waiter] : waiters_) numbers.push_back(number);
  world_.random.Shuffle(&numbers);
  for (const int64_t number : numbers) TryWaiter(number);
}

void SimCoordinator::TryWaiter(int64_t number) {
  Serve([this, number] {
    const auto asking = waiters_.find(number);
    if (asking == waiters_.end()) return;
    const std::string worker_id = asking->second.worker_id;
    const std::string worker = WorkerName(worker_id);
    absl::StatusOr<std::optional<jobs::JobQueue::GrantedLease>> lease(std::nullopt);
    if (!process_->registry.IsDraining(worker_id)) lease = queue_->Acquire(worker);
    if (process_->store.is_dead()) return;
    const auto waiter = waiters_.find(number);  // it may have gone meanwhile
    if (!lease.ok()) {
      if (waiter != waiters_.end()) waiter->second.reply(lease.status());
    } else if (!lease->has_value()) {
      if (waiter == waiters_.end() || !waiter->second.is_over) return;
      waiter->second.reply(internal_v1::AcquireLeaseResponse());
    } else {
      const std::string id = (*lease)->job.name().substr(kJobCollection.size());
      world_.history.OnGranted(worker, id, (*lease)->token);
      if (waiter == waiters_.end()) {
        queue_->Complete(worker, id, (*lease)->token, jobs::GiveBack{(*lease)->token}, nullptr)
            .IgnoreError();
        return;
      }
      process_->registry.SetRunningJob(worker_id, (*lease)->job.name());
      internal_v1::AcquireLeaseResponse response;
      response.mutable_lease()->set_job_name((*lease)->job.name());
      response.mutable_lease()->set_fencing_token((*lease)->token);
      SetSeconds(kLeaseDuration, response.mutable_lease()->mutable_duration());
      *response.mutable_lease()->mutable_job() = (*lease)->job;
      waiter->second.reply(response);
    }
    waiters_.erase(number);
  });
}

void SimCoordinator::Heartbeat(const internal_v1::HeartbeatRequest& request,
                               const Reply<internal_v1::HeartbeatResponse>& reply) {
  if (!is_up()) return reply(absl::UnavailableError("connection refused"));
  if (const absl::Status seen = process_->registry.Heartbeat(request); !seen.ok()) {
    return reply(seen);
  }
  internal_v1::HeartbeatResponse response;
  if (!request.job_name().empty()) {
    const std::string worker = WorkerName(request.worker_id());
    const std::string id = request.job_name().substr(kJobCollection.size());
    const jobs::JobQueue::LeaseState lease = queue_->Renew(worker, id, request.fencing_token());
    if (lease.is_held) {
      world_.history.OnAccepted(worker, id, request.fencing_token(), "a heartbeat");
    }
    response.set_lease_valid(lease.is_held);
    response.set_cancel_job(lease.is_cancelled);
  }
  reply(response);
}

void SimCoordinator::ReportProgress(const internal_v1::ReportProgressRequest& request,
                                    const Reply<Empty>& reply) {
  Answer<Empty>(reply, [this, request]() -> absl::StatusOr<Empty> {
    WALSH_RETURN_IF_ERROR(process_->registry.Touch(request.worker_id()));
    const std::string worker = WorkerName(request.worker_id());
    const std::string id = request.job_name().substr(kJobCollection.size());
    WALSH_RETURN_IF_ERROR(
        queue_->Report(worker, id, jobs::Report{request.fencing_token(), request.event()}));
    world_.history.OnAccepted(worker, id, request.fencing_token(), "a report");
    return Empty();
  });
}

void SimCoordinator::CompleteJob(const internal_v1::CompleteJobRequest& request,
                                 const Reply<Empty>& reply) {
  Answer<Empty>(reply, [this, request]() -> absl::StatusOr<Empty> {
    WALSH_RETURN_IF_ERROR(process_->registry.Touch(request.worker_id()));
    const std::string id = request.job_name().substr(kJobCollection.size());
    const absl::Status completed = Complete(request);
    if (!process_->store.is_dead()) {
      world_.history.OnCompletion(id, request.fencing_token(), completed);
    }
    WALSH_RETURN_IF_ERROR(completed);
    if (request.refused()) world_.history.OnRefused(WorkerName(request.worker_id()), id);
    return Empty();
  });
}

absl::Status SimCoordinator::Complete(const internal_v1::CompleteJobRequest& request) {
  const std::string worker = WorkerName(request.worker_id());
  const std::string id = request.job_name().substr(kJobCollection.size());
  const int64_t token = request.fencing_token();
  if (request.has_result()) {
    return queue_->Complete(worker, id, token, jobs::Succeed{token, request.result()},
                            &request.model());
  }
  jobs::JobEvent outcome = jobs::GiveBack{token};
  if (request.has_cancelled()) outcome = jobs::AcknowledgeCancel{token};
  if (request.has_error() && request.refused()) {
    outcome = jobs::Refuse{token, request.error(), request.error_reason()};
  } else if (request.has_error()) {
    outcome =
        jobs::Fail{token, request.error(), request.error_reason(), 2 * world_.random.Share() - 1};
  }
  return queue_->Complete(worker, id, token, outcome, nullptr);
}

void SimCoordinator::Deregister(const internal_v1::DeregisterRequest& request,
                                const Reply<Empty>& reply) {
  Answer<Empty>(reply, [this, request]() -> absl::StatusOr<Empty> {
    process_->registry.Deregister(request.worker_id());
    WALSH_RETURN_IF_ERROR(queue_->ReturnLease(WorkerName(request.worker_id())));
    return Empty();
  });
}

void SimCoordinator::Submit(const v1::QuantizationJob& job, const std::string& id,
                            const jobs::RequestKey& key, const std::string& tenant,
                            const Reply<v1::QuantizationJob>& reply) {
  Answer<v1::QuantizationJob>(reply, [=, this]() -> absl::StatusOr<v1::QuantizationJob> {
    const absl::Status free = queue_->CheckNamesAreFree("", job.model_name());
    WALSH_ASSIGN_OR_RETURN(std::optional<v1::QuantizationJob> before, queue_->FindSubmitted(key));
    if (before.has_value()) return *std::move(before);
    WALSH_RETURN_IF_ERROR(free);
    return queue_->Submit(job, id, key,
                          {.tenant = tenant, .live_jobs_max = options_.limits.tenant_jobs_max});
  });
}

void SimCoordinator::Cancel(const std::string& id, const Reply<v1::QuantizationJob>& reply) {
  Answer<v1::QuantizationJob>(reply, [this, id] { return queue_->Cancel(id); });
}

void SimCoordinator::Delete(const std::string& id, const Reply<Empty>& reply) {
  Answer<Empty>(reply, [this, id]() -> absl::StatusOr<Empty> {
    WALSH_RETURN_IF_ERROR(queue_->Delete(id));
    return Empty();
  });
}

}  // namespace walsh::sim
