// How good an artifact is: perplexity of a text, divergence from an original, zero-shot tasks.
//
// Everything that was asked for is read, encoded and checked before the first forward pass, so that
// a bad file is refused at once. Weights are the artifact's stored ones in floats, read a layer at
// a time; texts go through the model in blocks of windows. docs/quality.md defines the figures.
//
// Errors:  INVALID_ARGUMENT  task files that are too large together, a reference whose vocabulary
// or
//                            tokenizer is another; others are those of the files' readers, of the
//                            tokenizer and of the evaluation; what is about a text, a task or the
//                            reference begins with its name
//          and what `progress` and `check_memory` return, as it is
// Memory:  evaluation_memory.h
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/evaluate/tasks/score_task.h"
#include "worker/evaluate/tasks/task_file.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::evaluate {

struct TextSpec {
  std::string path;            // resolved
  std::string name;            // as it was asked for, see NamedFile; empty: the path
  bool joins_rows = false;     // WikiText-2's convention; see JoinRows
  int64_t window = 0;          // tokens; 0: 2,048, cut to the model's context
  int64_t stride = 0;          // from window to window; 0: the window
  int64_t max_windows = 0;     // 0: all, at most limits::kEvaluationWindowsMax
  std::string reference_path;  // of the original; empty: none
};

struct EvaluationSpec {
  // Asked once, before the work, whether so much memory may be used (EvaluationBytes). A status
  // that is not OK becomes the evaluation's. Empty: it always may.
  using CheckMemory = std::function<absl::Status(int64_t bytes_needed)>;

  std::string artifact_directory;
  std::optional<TextSpec> text;
  std::vector<TaskSpec> tasks;
  bool skip_bos = false;
  CheckMemory check_memory;
};

struct TextReport {
  double loss = 0;      // mean over the scored tokens
  Estimate perplexity;  // its standard error from the spread of the windows' losses
  int64_t windows = 0;
  int64_t tokens = 0;  // scored
  int64_t window = 0, stride = 0;
  std::string fingerprint;
  // With a reference.
  std::string reference_format;
  double reference_perplexity = 0;
  Estimate kl_divergence;
  double top1_agreement = 0;
};

struct EvaluationReport {
  std::optional<TextReport> text;
  std::vector<TaskReport> tasks;
  std::vector<std::string> warnings;
};

// Called with what is evaluated and the share of all that is done: between files, items and slices
// of text that are read, and then as perplexity.h and log_likelihood.h say.
using StepProgress = std::function<absl::Status(const std::string& step, double fraction)>;

absl::StatusOr<EvaluationReport> EvaluateArtifact(const EvaluationSpec& spec, ThreadPool& pool,
                                                  const StepProgress& progress);

}  // namespace walsh::evaluate
