// Validation of generation requests that needs no model: the coordinator runs it before routing,
// the worker again before its own checks (vocabulary, context).
//
// Limits are those of common/limits.h. Every string must be valid UTF-8, every number finite.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations; the message names the field, the limit
//         and the value.
#pragma once

#include "absl/status/status.h"
#include "walsh/v1/generation.pb.h"

namespace walsh {

absl::Status ValidateSampling(const v1::SamplingParams& sampling);
absl::Status ValidateRequest(const v1::GenerateRequest& request);
absl::Status ValidateRequest(const v1::ChatRequest& request);
absl::Status ValidateRequest(const v1::TokenizeRequest& request);
absl::Status ValidateRequest(const v1::DetokenizeRequest& request);

}  // namespace walsh
