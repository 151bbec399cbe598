// Whether a finished job's model kept enough of the original's quality to be published.
//
// Errors: FAILED_PRECONDITION  names each figure that is beyond its limit, and the limit; or that
// the
//                              model was not evaluated: what was not measured is not passed
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::pipeline {

absl::Status CheckQuality(const QualityGate& gate, const JobReport& report);

// Fewer evaluation tokens than this let chance decide: the standard error of a perplexity's ratio
// is then some percent.
inline constexpr int64_t kGateTokensMin = 2048;
// What to say of a model that is judged on fewer; empty where there is nothing to say.
std::string GateWarning(const QualityGate& gate, const JobReport& report);

}  // namespace walsh::pipeline
