// Quantization jobs between the wire and the pipeline.
//
// Errors: INVALID_ARGUMENT names the field that is out of range
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "walsh/internal/v1/worker.pb.h"
#include "walsh/v1/evaluation.pb.h"
#include "walsh/v1/quantization.pb.h"
#include "worker/evaluate/tasks/score_task.h"
#include "worker/evaluate/tasks/task_file.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::service {

// A path of a job to one that this worker may read.
using PathResolver = std::function<absl::StatusOr<std::string>(std::string_view path)>;
// The same where it matters what the path is for.
struct PathResolvers {
  PathResolver model;
  PathResolver text;
};

// An error begins with the field, as the client knows it, and keeps its details.
absl::StatusOr<std::string> ResolveField(const PathResolver& resolve, const std::string& field,
                                         const std::string& path);

absl::StatusOr<std::vector<evaluate::TaskSpec>> ToTaskSpecs(
    const std::string& field, const google::protobuf::RepeatedPtrField<v1::TaskEvaluation>& tasks,
    const PathResolver& resolve);
v1::TaskResult ToProto(const evaluate::TaskReport& report);

// Everything but the output directory, with the defaults of the proto filled in.
absl::StatusOr<pipeline::JobSpec> ToJobSpec(const v1::QuantizationJob& job,
                                            const PathResolvers& resolve);

// INVALID_ARGUMENT also for a gate on a job that is not evaluated.
absl::StatusOr<pipeline::QualityGate> ToQualityGate(const v1::QuantizationConfig& config);

v1::QuantizationJob::Stage ToProto(pipeline::Stage stage);
v1::QuantizationJob::LinearResult ToProto(const pipeline::LinearReport& linear);
// `sequence`, `time` and `attempt` are the coordinator's.
v1::QuantizationJobEvent ToEvent(const pipeline::JobProgress& progress);
v1::QuantizationJob::Result ToResult(const pipeline::JobReport& report,
                                     const std::string& model_id);
internal::v1::ValidateJobResponse ToResponse(const pipeline::JobPlan& plan);

}  // namespace walsh::service
