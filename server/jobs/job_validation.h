// Checks a new job field by field and fills in its preset (presets.h) and the defaults that the
// protocol documents.
//
// What only a worker can know (the source model, its shapes, calibration files, memory) is not
// checked here; group_size 0 and block_size 0 ("auto") therefore stay.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations: the field, the limit and the value.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::jobs {

// The job as it will be stored, without name and state: output-only fields are dropped, defaults
// set.
absl::StatusOr<v1::QuantizationJob> ValidateNewJob(const v1::CreateQuantizationJobRequest& request);

// Identifies what a request asks for, whatever its request_id: equal for equal bodies. The preset
// is its name: a retry is the same request when a new version has changed what is in it.
std::string BodySha256(const v1::CreateQuantizationJobRequest& request);

}  // namespace walsh::jobs
