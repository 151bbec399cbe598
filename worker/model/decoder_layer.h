// One decoder layer of the Llama family, as the steps between which calibration looks in.
//
//   a = AttentionInput(h)            RMSNorm
//   q, k, v = linears(a); RoPE       Project
//   c = Attention(q, k, v)           Attend
//   h += o_proj(c)                   AttentionOutput
//   m = MlpInput(h)                  RMSNorm
//   s = silu(gate(m)) · up(m)        MlpActivation
//   h += down_proj(s)                MlpOutput
//
// Serving runs them in a row (ForwardLayer); quantization runs each over all calibration windows
// and quantizes the linears whose inputs it has seen before it goes on.
//
// Shapes: hidden [n_tokens, hidden]; rows of several sequences follow one another
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/model_config.h"
#include "worker/kernels/kernels.h"
#include "worker/model/linear.h"

namespace walsh {

struct DecoderLayer {
  std::vector<float> input_norm;           // [hidden]; empty: ones (folded)
  std::vector<float> post_attention_norm;  // [hidden]; empty: ones
  std::unique_ptr<Linear> q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
};

// The weights of layer `index` as floats.
absl::StatusOr<DecoderLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t index);

// Inverse frequencies of RoPE with the configuration's scaling, [head_dim / 2].
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);

// What every layer of a forward pass shares.
struct ForwardContext {
  const ModelConfig* config = nullptr;
  std::vector<float> inverse_frequencies;
  kernels::Stream stream;
  static ForwardContext Create(const ModelConfig& config, const kernels::Stream& stream);
};

// A sequence's rows in the batch and the keys and values that it attends to. `keys` and `values`
// have room for n_past + n_rows rows of kv_width floats; ForwardLayer writes the last n_rows.
struct SequenceSlice {
  int64_t first_row = 0;
  int64_t n_rows = 0;
  int64_t n_past = 0;
  float* keys = nullptr;
  float* values = nullptr;
};

absl::Status AttentionInput(const ForwardContext& context, const DecoderLayer& layer,
                            const float* hidden, int64_t n_tokens, float* normed);
// q [n_tokens, q_width], k and v [n_tokens, kv_width]; RoPE applied to q and k.
absl::Status Project(const ForwardContext& context, const DecoderLayer& layer, const float* normed,
                     std::span<const int32_t> positions, float* q, float* k, float* v);
// q rows of each sequence against its keys and values (already holding the new rows).
absl::Status Attend(const ForwardContext& context, const float* q,
                    std::span<const SequenceSlice> sequences, float* attended);
// hidden += o_proj(attended); `scratch` [n_tokens, hidden].
absl::Status AttentionOutput(const ForwardContext& context, const DecoderLayer& layer,
                             const float* attended, int64_t n_tokens, float* hidden,
                             float* scratch);
absl::Status MlpInput(const ForwardContext& context, const DecoderLayer& layer, const float* hidden,
                      int64_t n_tokens, float* normed);
// `activation` [n_tokens, intermediate]; `scratch` [n_tokens, intermediate].
absl::Status MlpActivation(const ForwardContext& context, const DecoderLayer& layer,
                           const float* normed, int64_t n_tokens, float* activation,
                           float* scratch);
absl::Status MlpOutput(const ForwardContext& context, const DecoderLayer& layer,
                       const float* activation, int64_t n_tokens, float* hidden, float* scratch);

// Buffers that grow to the largest batch seen and are reused.
class ForwardScratch {
 public:
  void Reserve(const ModelConfig& config, int64_t n_tokens);
  Matrix normed, q, k, v, attended, gate, up, out;
};

// All steps; copies the new keys and values to the sequences' caches.
absl::Status ForwardLayer(const ForwardContext& context, const DecoderLayer& layer,
                          std::span<const int32_t> positions,
                          std::span<const SequenceSlice> sequences, int64_t n_tokens, float* hidden,
                          ForwardScratch& scratch);

}  // namespace walsh
