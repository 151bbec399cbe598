#include "server/api/lease_wait.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "server/api/call.h"

namespace walsh::api {
namespace {

using walsh::internal::v1::AcquireLeaseRequest;
using walsh::internal::v1::AcquireLeaseResponse;

constexpr absl::Duration kWaitMax = absl::Seconds(60);

class LeaseWait : public grpc::ServerUnaryReactor, public std::enable_shared_from_this<LeaseWait> {
 public:
  LeaseWait(Core* core, const AcquireLeaseRequest& request, AcquireLeaseResponse* response)
      : core_(core),
        worker_id_(request.worker_id()),
        wait_(std::clamp(
            absl::Seconds(request.wait().seconds()) + absl::Nanoseconds(request.wait().nanos()),
            absl::ZeroDuration(), kWaitMax)),
        response_(response) {}

  void Start() {
    self_ = shared_from_this();
    const std::weak_ptr<LeaseWait> weak = weak_from_this();
    // Before the first try, so that no job slips in between.
    subscription_ = core_->queue->work_subscriptions().Add(worker_id_, [weak] {
      if (const std::shared_ptr<LeaseWait> wait = weak.lock()) wait->OnWork();
    });
    core_->executor->PostAfter(wait_, [weak] {
      if (const std::shared_ptr<LeaseWait> wait = weak.lock()) wait->OnTimeout();
    });
    OnWork();
  }

  void OnCancel() override {
    const absl::MutexLock lock(&mu_);
    FinishOnce(absl::CancelledError("the worker has gone"));
  }

  void OnDone() override {
    core_->queue->work_subscriptions().Remove(subscription_);
    std::shared_ptr<LeaseWait> self;  // goes after the lock
    const absl::MutexLock lock(&mu_);
    self = std::move(self_);
  }

 private:
  void OnWork() {
    const absl::MutexLock lock(&mu_);
    has_work_ = true;
    TryLater();
  }

  void OnTimeout() {
    const absl::MutexLock lock(&mu_);
    is_over_ = true;
    if (!is_trying_) FinishOnce(absl::OkStatus());
  }

  void TryLater() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_ || is_trying_ || !has_work_) return;
    has_work_ = false;
    is_trying_ = core_->executor->Post([self = shared_from_this()] { self->Try(); });
    if (!is_trying_) FinishOnce(Overloaded(absl::StatusCode::kUnavailable));
  }

  // On the executor.
  void Try() {
    {
      // A worker that has asked anew must not lose the lease of its later call to this one.
      const absl::MutexLock lock(&mu_);
      if (is_finished_) return;
    }
    const std::string worker = WorkerName(worker_id_);
    const bool may_have = !core_->is_stopping && !core_->registry->IsDraining(worker_id_);
    absl::StatusOr<std::optional<jobs::JobQueue::GrantedLease>> lease(std::nullopt);
    if (may_have) lease = core_->queue->Acquire(worker);
    // Not under the lock: it makes work for somebody, which notifies this object too.
    if (!Take(&lease)) GiveBack(worker, **lease);
  }

  // False: there is a lease and nobody to have it.
  bool Take(absl::StatusOr<std::optional<jobs::JobQueue::GrantedLease>>* lease) {
    const absl::MutexLock lock(&mu_);
    is_trying_ = false;
    if (!lease->ok()) {
      FinishOnce(lease->status());
    } else if (core_->is_stopping && !(*lease)->has_value()) {
      // Not an empty answer, after which the worker would ask again at once.
      FinishOnce(Stopping());
    } else if (!(*lease)->has_value()) {
      if (is_over_) FinishOnce(absl::OkStatus());
      TryLater();
    } else if (is_finished_) {
      return false;
    } else {
      core_->registry->SetRunningJob(worker_id_, (**lease)->job.name());
      Fill(***lease);
      FinishOnce(absl::OkStatus());
    }
    return true;
  }

  void GiveBack(const std::string& worker, const jobs::JobQueue::GrantedLease& lease) {
    const std::string id = lease.job.name().substr(kJobCollection.size());
    // When the store does not take it, the lease expires.
    core_->queue->Complete(worker, id, lease.token, jobs::GiveBack{lease.token}, nullptr)
        .IgnoreError();
  }

  void Fill(const jobs::JobQueue::GrantedLease& granted) {
    walsh::internal::v1::Lease* lease = response_->mutable_lease();
    lease->set_job_name(granted.job.name());
    lease->set_fencing_token(granted.token);
    lease->mutable_duration()->set_seconds(absl::ToInt64Seconds(core_->lease_duration));
    lease->mutable_duration()->set_nanos(
        static_cast<int32_t>(absl::ToInt64Nanoseconds(core_->lease_duration % absl::Seconds(1))));
    *lease->mutable_job() = granted.job;
  }

  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    is_finished_ = true;
    Finish(ToGrpcStatus(status));
  }

  Core* const core_;
  const std::string worker_id_;
  const absl::Duration wait_;
  AcquireLeaseResponse* const response_;
  jobs::Subscriptions::Id subscription_;

  absl::Mutex mu_;
  std::shared_ptr<LeaseWait> self_ ABSL_GUARDED_BY(mu_);  // until OnDone
  bool has_work_ ABSL_GUARDED_BY(mu_) = false;
  bool is_trying_ ABSL_GUARDED_BY(mu_) = false;
  bool is_over_ ABSL_GUARDED_BY(mu_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

grpc::ServerUnaryReactor* WaitForLease(grpc::CallbackServerContext* context, Core* core,
                                       const AcquireLeaseRequest& request,
                                       AcquireLeaseResponse* response) {
  auto wait = std::make_shared<LeaseWait>(core, request, response);
  EchoRequestId(context);
  wait->Start();
  return wait.get();
}

}  // namespace walsh::api
