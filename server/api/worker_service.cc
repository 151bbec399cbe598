#include "server/api/worker_service.h"

#include <string>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/arrival.h"
#include "server/api/lease_wait.h"

namespace walsh::api {
namespace {

using internal_v1::CompleteJobRequest;

// More than requests are given to arrive.
constexpr absl::Duration kDrainTimeout = absl::Seconds(10);

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  absl::Duration rest = duration;
  out->set_seconds(absl::IDivDuration(rest, absl::Seconds(1), &rest));
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
}

absl::StatusOr<jobs::JobEvent> OutcomeOf(const CompleteJobRequest& request) {
  const int64_t token = request.fencing_token();
  switch (request.outcome_case()) {
    case CompleteJobRequest::kResult:
      return jobs::JobEvent(jobs::Succeed{token, request.result()});
    case CompleteJobRequest::kError: {
      if (request.refused()) {
        return jobs::JobEvent(jobs::Refuse{token, request.error(), request.error_reason()});
      }
      thread_local absl::BitGen random;
      jobs::Fail failure{token, request.error(), request.error_reason(),
                         absl::Uniform(absl::IntervalClosed, random, -1.0, 1.0)};
      if (request.has_rejected_result()) failure.rejected_result = request.rejected_result();
      return jobs::JobEvent(std::move(failure));
    }
    case CompleteJobRequest::kCancelled:
      return jobs::JobEvent(jobs::AcknowledgeCancel{token});
    case CompleteJobRequest::kReturned:
      return jobs::JobEvent(jobs::GiveBack{token});
    case CompleteJobRequest::OUTCOME_NOT_SET:
      break;
  }
  return InvalidField("outcome", "is missing");
}

// The model that a result is about, as the worker described it.
absl::StatusOr<v1::Model> ModelOf(const CompleteJobRequest& request,
                                  const v1::QuantizationJob& job) {
  const std::string name = ModelName(job.model_name());
  if (request.model().name() != name) {
    return InvalidField("model.name", absl::StrCat("must be ", name, ", the job's model_name, is '",
                                                   request.model().name().substr(0, 128), "'"));
  }
  v1::Model model = request.model();
  model.set_quantization_job(job.name());
  return model;
}

absl::Status Complete(Core* core, const CompleteJobRequest& request) {
  WALSH_RETURN_IF_ERROR(core->registry->Touch(request.worker_id()));
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseJobName("job_name", request.job_name()));
  WALSH_ASSIGN_OR_RETURN(const jobs::JobEvent outcome, OutcomeOf(request));
  const std::string worker = WorkerName(request.worker_id());
  if (!request.has_result()) {
    return core->queue->Complete(worker, id, request.fencing_token(), outcome, nullptr);
  }
  const absl::StatusOr<v1::QuantizationJob> job = core->queue->Get(id);
  if (!job.ok()) {  // deleted since; Complete says what that means
    return core->queue->Complete(worker, id, request.fencing_token(), outcome, nullptr);
  }
  WALSH_ASSIGN_OR_RETURN(const v1::Model model, ModelOf(request, *job));
  const v1::Model row = fleet::ModelCatalog::Row(model);
  // Who hears that the job has succeeded finds its model. A repeated completion may come after the
  // model was deleted, and does not bring it back.
  return core->queue->Complete(worker, id, request.fencing_token(), outcome, &row, [&] {
    core->catalog->Publish(model);
    core->registry->SetModel(request.worker_id(), model);
  });
}

// What is not learnt now, because the disk is full or too much waits, is still news with the next
// heartbeat.
void LearnLater(Core* core, const fleet::ModelCatalog::Models& models) {
  const bool is_posted = core->executor->Post([core, models] {
    if (const absl::Status learnt = core->catalog->Learn(models); !learnt.ok()) {
      WALSH_LOG(Warning, "models of a worker are not stored yet", {"status", learnt});
    }
  });
  if (!is_posted) WALSH_LOG(Warning, "models of a worker are not stored yet", {"status", "busy"});
}

}  // namespace

grpc::ServerUnaryReactor* WorkerServiceImpl::Register(grpc::CallbackServerContext* context,
                                                      const internal_v1::RegisterRequest* request,
                                                      internal_v1::RegisterResponse* response) {
  const Call call(context, "Register");
  return call.Run(core_->executor, [core = core_, request, response]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const std::vector<std::string> replaced,
                           core->registry->Register(*request));
    WALSH_LOG(Info, "worker registered", {"worker", WorkerName(request->worker_id())},
              {"address", request->address()}, {"device", request->device()},
              {"version", request->version()}, {"models", request->models_size()});
    for (const std::string& id : replaced) {
      WALSH_LOG(Warning, "worker was replaced at its address", {"worker", WorkerName(id)});
      core->clients->Forget(id);
      WALSH_RETURN_IF_ERROR(core->queue->LoseLease(WorkerName(id)));
    }
    WALSH_RETURN_IF_ERROR(core->catalog->Learn(request->models()));
    SetDuration(core->heartbeat_interval, response->mutable_heartbeat_interval());
    SetDuration(core->lease_duration, response->mutable_lease_duration());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* WorkerServiceImpl::AcquireLease(
    grpc::CallbackServerContext* context, const internal_v1::AcquireLeaseRequest* request,
    internal_v1::AcquireLeaseResponse* response) {
  if (absl::Status known = core_->registry->Touch(request->worker_id()); !known.ok()) {
    return Call(context, "AcquireLease").FinishNow(known);
  }
  return WaitForLease(context, core_, *request, response);
}

// Answered on gRPC's own thread: nothing in it waits, so that leases live through a slow disk.
grpc::ServerUnaryReactor* WorkerServiceImpl::Heartbeat(grpc::CallbackServerContext* context,
                                                       const internal_v1::HeartbeatRequest* request,
                                                       internal_v1::HeartbeatResponse* response) {
  const Call call(context, "Heartbeat");
  if (absl::Status seen = core_->registry->Heartbeat(*request); !seen.ok()) {
    return call.FinishNow(seen);
  }
  if (!request->job_name().empty()) {
    const absl::StatusOr<std::string> id = ParseJobName("job_name", request->job_name());
    if (!id.ok()) return call.FinishNow(id.status());
    const jobs::JobQueue::LeaseState lease =
        core_->queue->Renew(WorkerName(request->worker_id()), *id, request->fencing_token());
    response->set_lease_valid(lease.is_held);
    response->set_cancel_job(lease.is_cancelled);
  }
  if (core_->catalog->HasNews(request->models())) LearnLater(core_, request->models());
  return call.FinishNow(absl::OkStatus());
}

grpc::ServerUnaryReactor* WorkerServiceImpl::ReportProgress(
    grpc::CallbackServerContext* context, const internal_v1::ReportProgressRequest* request,
    google::protobuf::Empty*) {
  const Call call(context, "ReportProgress");
  return call.Run(core_->executor, [core = core_, request]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(core->registry->Touch(request->worker_id()));
    WALSH_ASSIGN_OR_RETURN(const std::string id, ParseJobName("job_name", request->job_name()));
    return core->queue->Report(WorkerName(request->worker_id()), id,
                               jobs::Report{request->fencing_token(), request->event()});
  });
}

grpc::ServerUnaryReactor* WorkerServiceImpl::CompleteJob(
    grpc::CallbackServerContext* context, const internal_v1::CompleteJobRequest* request,
    google::protobuf::Empty*) {
  const Call call(context, "CompleteJob");
  return call.Run(core_->executor, [core = core_, request] { return Complete(core, *request); });
}

grpc::ServerUnaryReactor* WorkerServiceImpl::Drain(grpc::CallbackServerContext* context,
                                                   const internal_v1::DrainRequest* request,
                                                   google::protobuf::Empty*) {
  const Call call(context, "Drain");
  const std::string& id = request->worker_id();
  if (absl::Status known = core_->registry->Drain(id); !known.ok()) return call.FinishNow(known);
  WALSH_LOG(Info, "worker drains", {"worker", WorkerName(id)});
  return call.RunAsync(core_->executor, [core = core_, call, id] {
    AfterArrival(
        core, [core, id] { return core->registry->RequestsOf(id); }, kDrainTimeout,
        call.cancellation(), [call](const absl::Status& arrived) { call.Finish(arrived); });
  });
}

grpc::ServerUnaryReactor* WorkerServiceImpl::Deregister(
    grpc::CallbackServerContext* context, const internal_v1::DeregisterRequest* request,
    google::protobuf::Empty*) {
  const Call call(context, "Deregister");
  return call.Run(core_->executor, [core = core_, request]() -> absl::Status {
    const std::string worker = WorkerName(request->worker_id());
    core->registry->Deregister(request->worker_id());
    core->clients->Forget(request->worker_id());
    WALSH_LOG(Info, "worker left", {"worker", worker});
    return core->queue->ReturnLease(worker);
  });
}

}  // namespace walsh::api
