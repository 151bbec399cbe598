#include "worker/service/model_host_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "worker/kernels/device_failure.h"
#include "worker/service/disk_check.h"
#include "worker/service/job_device.h"

namespace walsh::service {
namespace {

// The handler's answer from a value or an error.
template <typename T>
grpc::Status Answer(absl::StatusOr<T> result, T* response) {
  if (!result.ok()) return ToGrpcStatus(result.status());
  *response = *std::move(result);
  return grpc::Status::OK;
}

// Runs `convert` while its progress goes to the client, who ends it by going away; then `last`.
template <typename Response, typename Function>
grpc::Status Convert(grpc::ServerContext* context, grpc::ServerWriter<Response>* writer,
                     Response* last, const Function& convert) {
  const auto progress = [&](int64_t done, int64_t total) -> absl::Status {
    Response response;
    response.mutable_progress()->set_tensors_done(static_cast<int32_t>(done));
    response.mutable_progress()->set_tensors_total(static_cast<int32_t>(total));
    if (!context->IsCancelled() && writer->Write(response)) return absl::OkStatus();
    return absl::CancelledError("the client has gone");
  };
  const absl::Status status = convert(progress);
  if (status.ok()) writer->Write(*last);
  return ToGrpcStatus(status);
}

}  // namespace

ModelHostService::ModelHostService(Options options, ModelStore* models,
                                   ModelConversions* conversions)
    : options_(std::move(options)), models_(models), conversions_(conversions) {}

absl::StatusOr<internal::v1::ValidateJobResponse> ModelHostService::Validate(
    const v1::QuantizationJob& job, const KeepGoing& keep_going) const {
  References references(options_.sources, options_.resolve, FetchExtent::kHeaders,
                        [&](int64_t, int64_t) { return Ask(keep_going); });
  WALSH_ASSIGN_OR_RETURN(const pipeline::JobSpec spec, ToJobSpec(job, references.resolvers()));
  WALSH_RETURN_IF_ERROR(models_->CheckNameIsFree(job.model_name()));
  WALSH_ASSIGN_OR_RETURN(const pipeline::JobPlan plan, options_.plan(spec));
  WALSH_ASSIGN_OR_RETURN(const WorkerMemory memory, options_.memory());
  WALSH_RETURN_IF_ERROR(CheckMemory(plan, memory));
  WALSH_ASSIGN_OR_RETURN(const int64_t free_disk_bytes, FreeBytes(options_.data_dir));
  WALSH_RETURN_IF_ERROR(
      CheckDisk("the artifact", plan.disk_bytes_needed, free_disk_bytes, options_.data_dir));
  internal::v1::ValidateJobResponse response = ToResponse(plan);
  response.set_device(options_.device);
  response.set_memory_bytes_total(memory.host.total_bytes);
  response.set_memory_bytes_free(memory.host.free_bytes);
  response.set_device_memory_bytes_total(memory.device.total_bytes);
  response.set_device_memory_bytes_free(memory.device.free_bytes);
  response.set_disk_bytes_free(free_disk_bytes);
  for (const std::string& warning : MemoryWarnings(plan, memory)) response.add_warnings(warning);
  return response;
}

grpc::Status ModelHostService::ValidateJob(grpc::ServerContext* context,
                                           const internal::v1::ValidateJobRequest* request,
                                           internal::v1::ValidateJobResponse* response) {
  absl::StatusOr<internal::v1::ValidateJobResponse> validated = Validate(request->job(), [context] {
    return context->IsCancelled() ? absl::CancelledError("the caller has gone") : absl::OkStatus();
  });
  if (IsDeviceBroken(validated.status())) {
    options_.on_device_broken(validated.status());
    validated = DeviceBrokenError(options_.device, validated.status());
  }
  return Answer(std::move(validated), response);
}

grpc::Status ModelHostService::LoadModel(grpc::ServerContext*,
                                         const internal::v1::HostModelRequest* request,
                                         v1::Model* response) {
  const absl::StatusOr<std::string> id = ParseModelName("model", request->model());
  return Answer(id.ok() ? models_->Load(*id) : id.status(), response);
}

grpc::Status ModelHostService::UnloadModel(grpc::ServerContext*,
                                           const internal::v1::HostModelRequest* request,
                                           v1::Model* response) {
  const absl::StatusOr<std::string> id = ParseModelName("model", request->model());
  return Answer(id.ok() ? models_->Unload(*id) : id.status(), response);
}

grpc::Status ModelHostService::DeleteModel(grpc::ServerContext*,
                                           const internal::v1::HostModelRequest* request,
                                           google::protobuf::Empty*) {
  const absl::StatusOr<std::string> id = ParseModelName("model", request->model());
  return ToGrpcStatus(id.ok() ? models_->Delete(*id) : id.status());
}

grpc::Status ModelHostService::ExportModel(grpc::ServerContext* context,
                                           const v1::ExportModelRequest* request,
                                           grpc::ServerWriter<v1::ExportModelResponse>* writer) {
  v1::ExportModelResponse last;
  return Convert(context, writer, &last, [&](const ConversionProgress& progress) -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(*last.mutable_model_export(), conversions_->Export(*request, progress));
    return absl::OkStatus();
  });
}

grpc::Status ModelHostService::ImportModel(grpc::ServerContext* context,
                                           const v1::ImportModelRequest* request,
                                           grpc::ServerWriter<v1::ImportModelResponse>* writer) {
  v1::ImportModelResponse last;
  return Convert(context, writer, &last, [&](const ConversionProgress& progress) -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(*last.mutable_model(), conversions_->Import(*request, progress));
    return absl::OkStatus();
  });
}

}  // namespace walsh::service
