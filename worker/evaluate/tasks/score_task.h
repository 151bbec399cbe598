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
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
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

absl::StatusOr<TaskScore> ScoreTask(const Task& task, const Tokenizer& tokenizer,
                                    LayerSource& source, const TaskOptions& options,
                                    ThreadPool& pool, const Progress& progress);

}  // namespace walsh::evaluate
