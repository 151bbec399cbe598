// Validation of a job's config that needs no model and knows no defaults: the coordinator runs it
// before a job is stored, the worker again. What else is in a config is checked where its defaults
// are filled in, or in evaluation_limits.h.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations; the message names the field, the limit
//         and the value.
#pragma once

#include "absl/status/status.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh {

// Kinds, signs and blocks.
absl::Status ValidateRotation(const v1::Rotation& rotation);

// Whether a pattern matches a linear only a worker can tell.
absl::Status ValidateOverrides(const v1::QuantizationConfig& config);

// Activations and the KV cache, and the rotation that only the latter needs.
absl::Status ValidateRunTimeQuantizers(const v1::QuantizationConfig& config);

// Absent limits are no limits; a gate without any is none.
absl::Status ValidateQualityGate(const v1::QuantizationConfig& config);

}  // namespace walsh
