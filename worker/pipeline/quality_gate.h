// Whether a finished job's model kept enough of the original's quality to be published.
//
// Errors: FAILED_PRECONDITION  names each figure that is beyond its limit, and the limit; or that
// the
//                              model was not evaluated: what was not measured is not passed
#pragma once

#include "absl/status/status.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::pipeline {

absl::Status CheckQuality(const QualityGate& gate, const JobReport& report);

}  // namespace walsh::pipeline
