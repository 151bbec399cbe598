// Validation of an evaluation's request that needs no model: the coordinator runs it before
// routing, the worker again.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations; the message names the field, the limit
//         and the value.
#pragma once

#include "absl/status/status.h"
#include "walsh/v1/evaluation.pb.h"

namespace walsh {

absl::Status ValidateEvaluation(const v1::EvaluateModelRequest& request);

}  // namespace walsh
