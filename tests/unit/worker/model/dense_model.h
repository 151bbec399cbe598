// A whole model in floats: the decoder layers between an embedding and a head, for tests.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/model/decoder_layer.h"

namespace walsh::testing {

struct DenseModel {
  ModelConfig config;
  Matrix embedding;  // [vocab, hidden]
  std::vector<DecoderLayer> layers;
  std::vector<float> final_norm;
  Matrix head;  // [vocab, hidden]; empty: the embedding

  static absl::StatusOr<DenseModel> Load(const Checkpoint& checkpoint);
};

// One sequence and its keys and values.
class Sequence {
 public:
  Sequence(const DenseModel& model, const kernels::Stream& stream, int64_t capacity);
  // Logits [tokens.size(), vocab] of the next tokens.
  absl::StatusOr<Matrix> Append(std::span<const int32_t> tokens);

 private:
  const DenseModel& model_;
  ForwardContext context_;
  ForwardScratch scratch_;
  int64_t capacity_;
  int64_t n_past_ = 0;
  std::vector<Matrix> keys_;    // by layer, [capacity, kv_width]
  std::vector<Matrix> values_;  // by layer
};

// `prompt` and what greedy decoding adds to it, one token at a time.
absl::StatusOr<std::vector<int32_t>> GreedyIds(const DenseModel& model,
                                               const kernels::Stream& stream,
                                               std::span<const int32_t> prompt, int n_new);
// Σ −log p(token | those before it) in nats, without the first token.
absl::StatusOr<double> NegativeLogLikelihood(const DenseModel& model, const kernels::Stream& stream,
                                             std::span<const int32_t> ids);

}  // namespace walsh::testing
