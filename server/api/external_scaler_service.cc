#include "server/api/external_scaler_service.h"

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace walsh::api {
namespace {

using externalscaler::IsActiveResponse;
using externalscaler::ScaledObjectRef;

constexpr char kMetric[] = "walsh-quantization-jobs";
constexpr char kJobsPerWorker[] = "jobsPerWorker";
constexpr int kJobsPerWorkerMax = 1000;
// Work that is there is notified of; that the last job has ended is noticed so much later at most.
constexpr absl::Duration kLookInterval = absl::Seconds(1);
// KEDA holds one for each ScaledObject, and whoever reaches the port may ask.
constexpr int kStreamsMax = 16;

absl::StatusOr<int> JobsPerWorker(const ScaledObjectRef& object) {
  const auto it = object.scalermetadata().find(kJobsPerWorker);
  if (it == object.scalermetadata().end()) return 1;
  int n = 0;
  if (!absl::SimpleAtoi(it->second, &n) || n < 1 || n > kJobsPerWorkerMax) {
    return InvalidField(absl::StrCat("scaledObjectRef.scalerMetadata.", kJobsPerWorker),
                        absl::StrCat("must be an integer from 1 to ", kJobsPerWorkerMax));
  }
  return n;
}

// Tells one watcher whether there are jobs, first and at each change. No thread is held, and one
// write is in flight.
class ActivityStream : public grpc::ServerWriteReactor<IsActiveResponse>,
                       public std::enable_shared_from_this<ActivityStream> {
 public:
  ActivityStream(Core* core, std::atomic<int>* n_open) : core_(core), n_open_(n_open) {}

  void Start() {
    self_ = shared_from_this();
    if (++*n_open_ > kStreamsMax) {
      const absl::MutexLock lock(&mu_);
      return FinishOnce(absl::ResourceExhaustedError(
          absl::StrCat("at most ", kStreamsMax, " streams of StreamIsActive are held")));
    }
    const std::weak_ptr<ActivityStream> weak = weak_from_this();
    subscription_ = core_->queue->work_subscriptions().Add(kMetric, [weak] {
      if (const std::shared_ptr<ActivityStream> stream = weak.lock()) stream->Look();
    });
    LookAgain();
  }

  void OnWriteDone(bool ok) override {
    {
      const absl::MutexLock lock(&mu_);
      is_writing_ = false;
      if (!ok) return FinishOnce(absl::CancelledError("the watcher has gone"));
    }
    Look();
  }

  void OnCancel() override {
    const absl::MutexLock lock(&mu_);
    FinishOnce(absl::CancelledError("the watcher has gone"));
  }

  void OnDone() override {
    --*n_open_;
    // Not under the lock: a notification that runs now holds the subscriptions' and wants ours.
    core_->queue->work_subscriptions().Remove(subscription_);
    std::shared_ptr<ActivityStream> self;  // goes after the lock
    const absl::MutexLock lock(&mu_);
    self = std::move(self_);
  }

 private:
  void LookAgain() {
    Look();
    const std::weak_ptr<ActivityStream> weak = weak_from_this();
    core_->executor->PostAfter(kLookInterval, [weak] {
      if (const std::shared_ptr<ActivityStream> stream = weak.lock()) stream->LookAgain();
    });
  }

  void Look() {
    const bool is_active = core_->queue->n_live() > 0;
    const absl::MutexLock lock(&mu_);
    if (is_finished_) return;
    if (core_->is_stopping) return FinishOnce(Stopping());
    if (is_writing_ || told_ == is_active) return;
    told_ = is_active;
    outgoing_.set_result(is_active);
    is_writing_ = true;
    StartWrite(&outgoing_);
  }

  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    is_finished_ = true;
    Finish(ToGrpcStatus(status));
  }

  Core* const core_;
  std::atomic<int>* const n_open_;  // of these streams
  jobs::Subscriptions::Id subscription_;

  absl::Mutex mu_;
  std::shared_ptr<ActivityStream> self_ ABSL_GUARDED_BY(mu_);  // until OnDone
  std::optional<bool> told_ ABSL_GUARDED_BY(mu_);
  IsActiveResponse outgoing_;  // of the write in flight
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

grpc::ServerUnaryReactor* ExternalScalerServiceImpl::IsActive(grpc::CallbackServerContext* context,
                                                              const ScaledObjectRef* /*request*/,
                                                              IsActiveResponse* response) {
  const Call call(context, "IsActive");
  response->set_result(core_->queue->n_live() > 0);
  return call.FinishNow(absl::OkStatus());
}

grpc::ServerWriteReactor<IsActiveResponse>* ExternalScalerServiceImpl::StreamIsActive(
    grpc::CallbackServerContext* context, const ScaledObjectRef* /*request*/) {
  EchoRequestId(context);
  auto stream = std::make_shared<ActivityStream>(core_, &n_streams_);
  stream->Start();
  return stream.get();
}

grpc::ServerUnaryReactor* ExternalScalerServiceImpl::GetMetricSpec(
    grpc::CallbackServerContext* context, const ScaledObjectRef* request,
    externalscaler::GetMetricSpecResponse* response) {
  const Call call(context, "GetMetricSpec");
  const absl::StatusOr<int> jobs_per_worker = JobsPerWorker(*request);
  if (!jobs_per_worker.ok()) return call.FinishNow(jobs_per_worker.status());
  externalscaler::MetricSpec* spec = response->add_metricspecs();
  spec->set_metricname(kMetric);
  spec->set_targetsize(*jobs_per_worker);
  spec->set_targetsizefloat(*jobs_per_worker);
  return call.FinishNow(absl::OkStatus());
}

grpc::ServerUnaryReactor* ExternalScalerServiceImpl::GetMetrics(
    grpc::CallbackServerContext* context, const externalscaler::GetMetricsRequest* request,
    externalscaler::GetMetricsResponse* response) {
  const Call call(context, "GetMetrics");
  if (request->metricname() != kMetric) {
    return call.FinishNow(NotFound("metric", request->metricname()));
  }
  const int64_t n_jobs = core_->queue->n_live();
  externalscaler::MetricValue* value = response->add_metricvalues();
  value->set_metricname(kMetric);
  value->set_metricvalue(n_jobs);
  value->set_metricvaluefloat(static_cast<double>(n_jobs));
  return call.FinishNow(absl::OkStatus());
}

}  // namespace walsh::api
