// Perplexity of two models on the same windows, and the divergence of the second from the first.
//
// Each model's windows go through one layer before the next is there, as in
// worker/evaluate/perplexity.h, in bf16 with a residual stream in float. Logits are made for some
// tokens at a time, of both models side by side; losses and divergence are summed in double.
//
// Units:   losses and divergence in nats per predicted token
// Errors:  DATA_LOSS  a non-finite loss; the message names the window
// Memory:  EvaluationBytes
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/calibrate/token_windows.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/pipeline/cuda/model_source.h"

namespace walsh::pipeline::cuda {

// Called as layers of a model are done, with their share of it, 0 … 1.
using EvaluationProgress = std::function<absl::Status(double fraction)>;

class Evaluator {
 public:
  // Both outlive the object.
  Evaluator(Context* context, const ModelConfig& config, const calibrate::TokenWindows& windows)
      : context_(*context), config_(config), windows_(windows) {}

  // The windows through the model, up to what the head multiplies.
  struct Outcome {
    DeviceBuffer<bf16> normed;  // [tokens, hidden]
    DeviceBuffer<bf16> head;    // [vocab, hidden]
  };
  absl::StatusOr<Outcome> Forward(ModelSource& source, const EvaluationProgress& progress);
  // Asks `keep_going` every few thousand tokens.
  absl::StatusOr<Quality> Compare(const Outcome& before, const Outcome& after,
                                  const evaluate::ScoredFrom& scored_from,
                                  const KeepGoing& keep_going);

  // Beside a layer's weights.
  static int64_t EvaluationBytes(const ModelConfig& config, int64_t n_tokens, int64_t window);

 private:
  int64_t n_tokens() const { return static_cast<int64_t>(windows_.ids.size()); }

  Context& context_;
  const ModelConfig& config_;
  const calibrate::TokenWindows& windows_;
};

}  // namespace walsh::pipeline::cuda
