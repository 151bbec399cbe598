// Zero-shot accuracy of a model on a task, as lm-evaluation-harness defines it.
//
//   accuracy       share of items whose continuation of the highest log-likelihood is the right one
//                  (of equals, the first); without choices, whose tokens are each the likeliest
//   accuracy_norm  the same with log-likelihoods divided by the choices' characters
//   perplexity     exp(−mean of the log-likelihoods), of a task without choices
//
// Standard errors are those of a mean over the items, s / √n with s² = Σ (x − x̄)² / (n − 1); that
// of the perplexity follows from it by the delta method.
//
// A context and a continuation are encoded together and the tokens beyond those of the context
// alone are the continuation's (white space at the context's end counts to the continuation). Where
// none is beyond, because they merged, they part where the two encodings do. A context that leaves
// no room for its continuation is cut from the left.
//
// Errors:  those of log_likelihood.h and of Tokenizer::Encode; the message names the item
//          INVALID_ARGUMENT  also for more tokens in all than a task's file may have bytes
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/tasks/log_likelihood.h"
#include "worker/evaluate/tasks/task_file.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::evaluate {

struct Estimate {
  double mean = 0;
  double standard_error = 0;  // 0 for a single item
};
Estimate MeanOf(std::span<const double> values);

struct TaskScore {
  Estimate accuracy;
  std::optional<Estimate> accuracy_norm;             // kContinuations
  std::optional<Estimate> perplexity;                // kLastWord
  int64_t tokens = 0;                                // forwarded, shared contexts once
  int64_t truncated_items = 0;                       // whose context was cut
  std::vector<std::vector<Likelihood>> likelihoods;  // by item and choice
};

struct TaskOptions {
  bool skip_bos = false;  // else contexts begin as the tokenizer's own rule says
};

// A task in a tokenizer's ids.
struct EncodedTask {
  // Where a choice's likelihood is found: choices of one context share it.
  struct Place {
    size_t context = 0;
    size_t continuation = 0;
  };
  std::vector<ContextTokens> contexts;
  std::vector<std::vector<Place>> places;  // by item and choice
  int64_t tokens = 0;                      // as in TaskScore
  int64_t truncated_items = 0;
};
// For a model of `config`, of which the context and the vocabulary count. Asks `keep_going` before
// each choice.
absl::StatusOr<EncodedTask> EncodeTask(const Task& task, const Tokenizer& tokenizer,
                                       const ModelConfig& config, const TaskOptions& options,
                                       const KeepGoing& keep_going);
absl::StatusOr<TaskScore> ScoreTask(const Task& task, const EncodedTask& encoded,
                                    LayerSource& source, ThreadPool& pool,
                                    const Progress& progress);

// Both.
absl::StatusOr<TaskScore> ScoreTask(const Task& task, const Tokenizer& tokenizer,
                                    LayerSource& source, const TaskOptions& options,
                                    ThreadPool& pool, const Progress& progress);

struct TaskReport {
  std::string name;
  int64_t items = 0;
  TaskScore score;  // without its likelihoods
};
TaskReport ReportOf(const Task& task, TaskScore score);

// Of a task with truncated items.
std::string TruncationWarning(const std::string& task, int64_t truncated_items,
                              int64_t context_max);

}  // namespace walsh::evaluate
