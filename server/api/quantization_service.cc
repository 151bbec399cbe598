#include "server/api/quantization_service.h"

#include <string>
#include <string_view>
#include <utility>

#include "common/architectures.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/create_job.h"
#include "server/api/stored_bytes.h"
#include "server/api/watch_stream.h"
#include "server/fleet/forwarding.h"
#include "server/jobs/job_query.h"
#include "server/jobs/presets.h"

namespace walsh::api {

grpc::ServerUnaryReactor* QuantizationServiceImpl::CreateQuantizationJob(
    grpc::CallbackServerContext* context, const v1::CreateQuantizationJobRequest* request,
    v1::QuantizationJob* response) {
  const Call call(context, "CreateQuantizationJob", core_->validation_max + core_->call_timeout);
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  if (!caller.ok()) return call.FinishNow(caller.status());
  // So that a client with less time than the workers may take gets its job all the same.
  const absl::Duration ask_max =
      fleet::WorkerTimeout(context->deadline(), core_->validation_max, core_->validation_max);
  return call.RunAsync(core_->executor, [core = core_, call, caller, ask_max, request, response] {
    CreateJob(core, call, *caller, ask_max, request, response);
  });
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::GetQuantizationJob(
    grpc::CallbackServerContext* context, const v1::GetQuantizationJobRequest* request,
    v1::QuantizationJob* response) {
  const Call call(context, "GetQuantizationJob", core_->call_timeout);
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  return call.Run(core_->executor, [core = core_, caller, request, response]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(caller.status());
    WALSH_ASSIGN_OR_RETURN(const std::string id, ParseJobName("name", request->name()));
    WALSH_ASSIGN_OR_RETURN(*response, core->queue->Get(id, caller->tenant));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::ListQuantizationJobs(
    grpc::CallbackServerContext* context, const v1::ListQuantizationJobsRequest* request,
    v1::ListQuantizationJobsResponse* response) {
  const Call call(context, "ListQuantizationJobs", core_->call_timeout);
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  return call.Run(core_->executor, [core = core_, caller, request, response]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(caller.status());
    WALSH_ASSIGN_OR_RETURN(const jobs::JobQuery query, jobs::ParseQuery(*request, caller->tenant));
    WALSH_ASSIGN_OR_RETURN(jobs::JobPage page, core->queue->List(query));
    for (jobs::JobRecord& record : page.jobs) {
      // The report of every linear is for GetQuantizationJob: a page of them would not fit a
      // message.
      if (record.job.has_result()) record.job.mutable_result()->clear_per_layer();
      *response->add_quantization_jobs() = std::move(record.job);
    }
    response->set_total_size(page.total_size);
    if (page.next.has_value()) response->set_next_page_token(jobs::PageToken(query, *page.next));
    return absl::OkStatus();
  });
}

grpc::ServerWriteReactor<v1::QuantizationJobEvent>* QuantizationServiceImpl::WatchQuantizationJob(
    grpc::CallbackServerContext* context, const v1::WatchQuantizationJobRequest* request) {
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  const absl::StatusOr<std::string> id = ParseJobName("name", request->name());
  const absl::Status status = caller.ok() ? id.status() : caller.status();
  if (!status.ok()) {
    LogEnd("WatchQuantizationJob", EchoRequestId(context), status);
    return new FailedStream<v1::QuantizationJobEvent>(status);
  }
  return WatchJob(context, core_, *id, caller->tenant, request->after_sequence());
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::CancelQuantizationJob(
    grpc::CallbackServerContext* context, const v1::CancelQuantizationJobRequest* request,
    v1::QuantizationJob* response) {
  const Call call(context, "CancelQuantizationJob", core_->call_timeout);
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  return call.Run(core_->executor, [core = core_, caller, request, response]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(caller.status());
    WALSH_ASSIGN_OR_RETURN(const std::string id, ParseJobName("name", request->name()));
    WALSH_ASSIGN_OR_RETURN(*response, core->queue->Cancel(id, caller->tenant));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::DeleteQuantizationJob(
    grpc::CallbackServerContext* context, const v1::DeleteQuantizationJobRequest* request,
    google::protobuf::Empty*) {
  const Call call(context, "DeleteQuantizationJob", core_->call_timeout);
  const absl::StatusOr<access::Caller> caller = core_->access->CallerOf(*context);
  return call.Run(core_->executor, [core = core_, caller, request]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(caller.status());
    WALSH_ASSIGN_OR_RETURN(const std::string id, ParseJobName("name", request->name()));
    WALSH_RETURN_IF_ERROR(CheckCountsNoModel(*core, *caller, id));
    return core->queue->Delete(id, caller->tenant);
  });
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::ListSupportedArchitectures(
    grpc::CallbackServerContext* context, const v1::ListSupportedArchitecturesRequest*,
    v1::ListSupportedArchitecturesResponse* response) {
  const Call call(context, "ListSupportedArchitectures");
  for (const std::string_view name : kHfArchitectures) {
    response->add_architectures(std::string(name));
  }
  for (const std::string_view name : kGgufArchitectures) {
    response->add_architectures(std::string(name));
  }
  return call.FinishNow(absl::OkStatus());
}

grpc::ServerUnaryReactor* QuantizationServiceImpl::ListQuantizationPresets(
    grpc::CallbackServerContext* context, const v1::ListQuantizationPresetsRequest*,
    v1::ListQuantizationPresetsResponse* response) {
  const Call call(context, "ListQuantizationPresets");
  const auto& presets = jobs::Presets();
  response->mutable_presets()->Add(presets.begin(), presets.end());
  return call.FinishNow(absl::OkStatus());
}

}  // namespace walsh::api
