// What an artifact says about itself: config.json's "quantization_config" and walsh.json.
//
// Everything in them follows from the source, the options and the code: no times, durations, paths
// or machine names, so that two runs of one job give the same bytes. docs/artifact-format.md lists
// the fields.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "worker/io/checkpoint.h"
#include "worker/pipeline/job_texts.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::pipeline {

// Read by other programs: GPTQ, format gptq_v2, weight-only; with a codebook, float zero points or
// online transforms walsh's own format, which they refuse.
nlohmann::json QuantizationConfig(const JobSpec& spec, const ModelConfig& config,
                                  const ResolvedJob& job);

struct ReportInputs {
  const JobSpec& spec;
  const ResolvedJob& job;
  const Checkpoint& checkpoint;
  const JobTexts& texts;
  std::string source_sha256;
};
// walsh.json before evaluation.
nlohmann::json ArtifactReport(const ReportInputs& inputs, const JobReport& report);

// The member "quality" of walsh.json, known only once the artifact is written.
nlohmann::json QualityReport(const ResolvedJob& job, const JobTexts& texts,
                             const JobReport& report);

}  // namespace walsh::pipeline
