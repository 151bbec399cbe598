// walsh.v1.EvaluationService on a worker: evaluates an artifact of its store.
//
// Validated again here, since the port may be reached by others than the coordinator. A blocking
// handler on gRPC's synchronous API, as ModelHostService has them; the work runs on threads as nice
// as a job's, beside it and the traffic, and stops within a layer when the call ends.
//
// Errors:  INVALID_ARGUMENT    a field, or a file that is not what it should be
//          NOT_FOUND           the model, or a file
//          FAILED_PRECONDITION more memory is needed than the worker has (INSUFFICIENT_MEMORY)
//          RESOURCE_EXHAUSTED  as many evaluations as are taken run (EVALUATION_RUNNING, with a
//                              retry delay), or no memory is left
//          UNAVAILABLE         the worker stops (WORKER_STOPPING)
//          CANCELLED, DEADLINE_EXCEEDED (at limits::kEvaluateSecondsMax, whatever the call's
//          deadline); others as EvaluateArtifact gives them
// Threads: gRPC's; Stop from any
#pragma once

#include <atomic>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "common/clock.h"
#include "walsh/v1/evaluation.grpc.pb.h"
#include "worker/evaluate/evaluate_artifact.h"
#include "worker/service/host_memory.h"
#include "worker/service/job_conversion.h"
#include "worker/service/model_sources.h"
#include "worker/service/model_store.h"

namespace walsh::service {

class EvaluationService final : public v1::EvaluationService::Service {
 public:
  using Evaluate = std::function<absl::StatusOr<evaluate::EvaluationReport>(
      const evaluate::EvaluationSpec&, ThreadPool&, const evaluate::StepProgress&)>;
  struct Options {
    PathResolver resolve;
    ModelSources* sources = nullptr;  // null: references are paths. Outlives the service
    int n_threads = 0;                // 0: the machine's
    std::function<HostMemory()> memory = ReadHostMemory;
    Evaluate evaluate = evaluate::EvaluateArtifact;
  };
  EvaluationService(Options options, const ModelStore* models, const Clock* clock);

  grpc::Status EvaluateModel(grpc::ServerContext* context, const v1::EvaluateModelRequest* request,
                             grpc::ServerWriter<v1::EvaluateModelResponse>* writer) override;
  // Ends running evaluations and refuses new ones.
  void Stop() { is_stopping_ = true; }

 private:
  absl::StatusOr<evaluate::EvaluationSpec> ToSpec(const v1::EvaluateModelRequest& request,
                                                  const PathResolvers& resolve) const;
  absl::Status CheckMemory(int64_t bytes_needed) const;
  absl::Status Run(grpc::ServerContext& context, const v1::EvaluateModelRequest& request,
                   grpc::ServerWriter<v1::EvaluateModelResponse>& writer);
  // On threads of its own.
  absl::StatusOr<evaluate::EvaluationReport> RunNicely(const evaluate::EvaluationSpec& spec,
                                                       const evaluate::StepProgress& progress);

  const Options options_;
  const ModelStore* const models_;
  const Clock* const clock_;
  std::atomic<int> n_running_ = 0;
  std::atomic<bool> is_stopping_ = false;
};

}  // namespace walsh::service
