// How far apart two measurements of a job's quality can be by chance.
//
// Standard errors of means over the evaluation windows, s / √n with s² = Σ (x − x̄)² / (n − 1), and
// by the delta method of the perplexities, which are exp of a mean loss. The ratio's is paired:
// both models read the same windows, whose difficulty drops out of the difference of losses.
#pragma once

#include <optional>

#include "worker/pipeline/quantize_job.h"

namespace walsh::pipeline {

struct QualityErrors {
  double perplexity_before = 0;
  double perplexity_after = 0;
  double perplexity_ratio = 0;          // of after to before
  std::optional<double> kl_divergence;  // in nats; absent where it was not measured
};

// Absent with fewer than two windows, which have no spread.
std::optional<QualityErrors> StandardErrors(const JobReport& report);

}  // namespace walsh::pipeline
