// Validation of evaluations, of published models and of jobs, that needs no model: the coordinator
// runs it before routing or storing, the worker again.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations; the message names the field, the limit
//         and the value.
#pragma once

#include "absl/status/status.h"
#include "walsh/v1/evaluation.pb.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh {

absl::Status ValidateEvaluation(const v1::EvaluateModelRequest& request);

// What a job's evaluation has in common with it, and what can do nothing beside the rest. Its uri
// and counts of windows have defaults, which those who fill them in check.
absl::Status ValidateEvaluation(const v1::Evaluation& evaluation);

}  // namespace walsh
