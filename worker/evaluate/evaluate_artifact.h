// How good an artifact is: perplexity of a text, divergence from an original, zero-shot tasks.
//
// Everything that was asked for is read, encoded and checked before the first forward pass, so that
// a bad file is refused at once. Weights are the artifact's stored ones in floats, read a layer at
// a time; texts go through the model in blocks of windows. docs/quality.md defines the figures.
//
// Errors:  those of the files' readers, of the tokenizer and of the evaluation; what is about a
//          text, a task or the reference begins with its name
// Memory:  the head, a layer, and the hidden states of a block of windows; with a reference twice,
//          one after the other but for the hidden states and the heads
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/tasks/score_task.h"
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

struct TaskSpec {
  std::string path;   // resolved
  std::string name;   // as it was asked for; empty: the path
  int64_t limit = 0;  // items; 0: all
};

struct EvaluationSpec {
  std::string artifact_directory;
  std::optional<TextSpec> text;
  std::vector<TaskSpec> tasks;
  bool skip_bos = false;
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

struct TaskReport {
  std::string name;
  int64_t items = 0;
  TaskScore score;  // without its likelihoods
};

struct EvaluationReport {
  std::optional<TextReport> text;
  std::vector<TaskReport> tasks;
  std::vector<std::string> warnings;
};

// Called every few hundred milliseconds with what is evaluated and the share of all that is done.
using StepProgress = std::function<absl::Status(const std::string& step, double fraction)>;

absl::StatusOr<EvaluationReport> EvaluateArtifact(const EvaluationSpec& spec, ThreadPool& pool,
                                                  const StepProgress& progress);

// Rows, one a line, as GPTQ and QuaRot evaluate WikiText-2: each keeps its "\n", those of white
// space alone become empty, and all are joined by "\n\n".
std::string JoinRows(std::string_view text);

// Windows of `length` tokens that begin `stride` apart, at most `n_max`: all tokens of a long text
// but the last are in one. `scored_from` as Compare takes it.
struct StridedWindows {
  calibrate::TokenWindows windows;
  std::vector<int64_t> scored_from;
};
StridedWindows CutStrided(std::span<const int32_t> ids, int64_t length, int64_t stride,
                          int64_t n_max);

}  // namespace walsh::evaluate
