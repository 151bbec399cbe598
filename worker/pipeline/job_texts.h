// The token windows of a job: what it is calibrated on and what it is evaluated on.
//
// Calibration takes the first windows of the calibration text, or of text that the model writes
// itself. Without an evaluation text of its own, evaluation takes windows that follow those, so
// that no token serves both; where the text is short, at most a fifth of it is kept back.
//
// Errors:  INVALID_ARGUMENT  a calibration text shorter than one window; others as
//          worker/calibrate/samples.h
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/calibrate/self_text.h"
#include "worker/calibrate/token_windows.h"
#include "worker/io/checkpoint.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::pipeline {

struct JobTexts {
  calibrate::TokenWindows calibration;
  calibrate::TokenWindows evaluation;  // empty: not evaluated
  std::vector<int64_t> first_scored;   // of its windows, as evaluate::ScoredFrom::positions
  int64_t kept = 0, dropped = 0, n_short = 0;
  std::vector<std::string> warnings;
};

// Tokens that `self` calibration generates.
int64_t SelfTextTokens(const JobSpec& spec, const ResolvedJob& job);

// Asks `keep_going` while texts are encoded. `own_text` is what the model wrote in an earlier run;
// where that is nothing, what it writes now.
absl::StatusOr<JobTexts> PrepareTexts(const JobSpec& spec, const ResolvedJob& job,
                                      const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                                      ThreadPool& pool,
                                      const calibrate::TokenProgress& self_progress,
                                      const KeepGoing& keep_going, std::vector<int32_t>& own_text);

}  // namespace walsh::pipeline
