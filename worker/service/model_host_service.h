// walsh.internal.v1.ModelHostService: what the coordinator asks of a worker beside generation.
//
// Blocking handlers on gRPC's synchronous API: a load takes as long as it takes, and must not hold
// one of the threads that streams need.
//
// Errors:  as ModelStore and pipeline::PlanJob give them; for a job also FAILED_PRECONDITION with
//          reason INSUFFICIENT_MEMORY, RESOURCE_EXHAUSTED with reason INSUFFICIENT_DISK and
//          UNAVAILABLE with reason DEVICE_BROKEN
// Threads: gRPC's
#pragma once

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/service/job_conversion.h"
#include "worker/service/memory_check.h"
#include "worker/service/model_conversions.h"
#include "worker/service/model_sources.h"
#include "worker/service/model_store.h"

namespace walsh::service {

class ModelHostService final : public internal::v1::ModelHostService::Service {
 public:
  using Plan = std::function<absl::StatusOr<pipeline::JobPlan>(const pipeline::JobSpec&)>;
  struct Options {
    std::string data_dir;
    std::string device = "cpu";  // of answers and messages
    PathResolver resolve;
    ModelSources* sources = nullptr;  // null: references are paths. Outlives the service
    Plan plan;                        // pipeline::PlanJob
    std::function<absl::StatusOr<WorkerMemory>()> memory;
    // Called with a status that IsDeviceBroken.
    std::function<void(const absl::Status&)> on_device_broken;
  };
  ModelHostService(Options options, ModelStore* models, ModelConversions* conversions);

  grpc::Status ValidateJob(grpc::ServerContext* context,
                           const internal::v1::ValidateJobRequest* request,
                           internal::v1::ValidateJobResponse* response) override;
  grpc::Status LoadModel(grpc::ServerContext* context,
                         const internal::v1::HostModelRequest* request,
                         v1::Model* response) override;
  grpc::Status UnloadModel(grpc::ServerContext* context,
                           const internal::v1::HostModelRequest* request,
                           v1::Model* response) override;
  grpc::Status DeleteModel(grpc::ServerContext* context,
                           const internal::v1::HostModelRequest* request,
                           google::protobuf::Empty* response) override;
  grpc::Status ExportModel(grpc::ServerContext* context, const v1::ExportModelRequest* request,
                           grpc::ServerWriter<v1::ExportModelResponse>* writer) override;
  grpc::Status ImportModel(grpc::ServerContext* context, const v1::ImportModelRequest* request,
                           grpc::ServerWriter<v1::ImportModelResponse>* writer) override;

 private:
  absl::StatusOr<internal::v1::ValidateJobResponse> Validate(const v1::QuantizationJob& job,
                                                             const KeepGoing& keep_going) const;

  const Options options_;
  ModelStore* const models_;
  ModelConversions* const conversions_;
};

}  // namespace walsh::service
