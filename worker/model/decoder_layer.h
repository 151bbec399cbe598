// One decoder layer of the Llama family and its relatives, as the steps between which calibration
// looks in.
//
//   a = AttentionInput(h)            RMSNorm
//   q, k, v = linears(a)             Project: RMSNorm of each head of q and k where the family has
//                                    it; RoPE
//   c = Attention(q, k, v)           Attend, to a window in sliding layers
//   h += o_proj(c)                   AttentionOutput, through a norm where the family has one there
//   m = MlpInput(h)                  RMSNorm
//   s = act(gate(m)) · up(m)         MlpActivation: SiLU, or GELU by its tanh formula
//   h += down_proj(s)                MlpOutput, likewise
//
// A layer's online transforms are part of the steps: what a step returns is what the next linears,
// or the caches, really get.
//
// Serving runs them in a row (ForwardLayer); quantization runs each over all calibration windows
// and quantizes the linears whose inputs it has seen before it goes on.
//
// Shapes: hidden [n_tokens, hidden]; rows of several sequences follow one another
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/model_config.h"
#include "worker/kernels/kernels.h"
#include "worker/model/linear.h"
#include "worker/model/online_forward.h"

namespace walsh {

struct DecoderLayer {
  std::vector<float> input_norm;           // [hidden]; empty: ones (folded)
  std::vector<float> post_attention_norm;  // [hidden], before the MLP; empty: ones
  std::unique_ptr<Linear> q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  // Where the family has them (ModelConfig::has_qk_norm, has_output_norms).
  std::vector<float> q_norm, k_norm;                          // [head_dim]
  std::vector<float> attention_output_norm, mlp_output_norm;  // [hidden]
  bool is_sliding = false;                      // ModelConfig::is_sliding of its index
  std::shared_ptr<const OnlineForward> online;  // null: nothing beside the weights
};

// A layer's tensors by HF's names, and where they go.
struct LayerLinear {
  std::string_view name;  // "self_attn.q_proj"
  std::unique_ptr<Linear> DecoderLayer::*linear;
};
// In the order in which they are quantized.
inline constexpr std::array<LayerLinear, 7> kLayerLinears = {{
    {"self_attn.q_proj", &DecoderLayer::q_proj},
    {"self_attn.k_proj", &DecoderLayer::k_proj},
    {"self_attn.v_proj", &DecoderLayer::v_proj},
    {"self_attn.o_proj", &DecoderLayer::o_proj},
    {"mlp.gate_proj", &DecoderLayer::gate_proj},
    {"mlp.up_proj", &DecoderLayer::up_proj},
    {"mlp.down_proj", &DecoderLayer::down_proj},
}};
// Their sizes, which are the same in every layer.
struct LinearShape {
  std::string_view name;
  int64_t in = 0;
  int64_t out = 0;
};
// In kLayerLinears' order.
std::vector<LinearShape> LinearShapes(const ModelConfig& config);

struct LayerNorm {
  std::string_view name;  // "input_layernorm.weight"
  std::vector<float> DecoderLayer::*weights;
  int64_t width = 0;
};
std::vector<LayerNorm> LayerNorms(const ModelConfig& config);

// Layer `index` from what reads a norm or a linear (weights and bias) by its full HF name; for
// linears without suffix.
using NormReader = std::function<absl::StatusOr<std::vector<float>>(const std::string& name)>;
using LinearReader =
    std::function<absl::StatusOr<std::unique_ptr<Linear>>(const std::string& name, bool has_bias)>;
absl::StatusOr<DecoderLayer> ReadLayer(const ModelConfig& config, int64_t index,
                                       const NormReader& read_norm,
                                       const LinearReader& read_linear);

// The weights of layer `index` as floats.
absl::StatusOr<DecoderLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t index);

// Inverse frequencies of RoPE with the configuration's scaling, [head_dim / 2].
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);
// Those of sliding layers, where they have a base of their own.
std::vector<float> SlidingRopeInverseFrequencies(const ModelConfig& config);

// An embedding's row as it enters the first layer: times ModelConfig::embedding_scale, in place.
void ScaleEmbedding(const ModelConfig& config, std::span<float> row);

// What every layer of a forward pass shares.
struct ForwardContext {
  const ModelConfig* config = nullptr;
  std::vector<float> inverse_frequencies;
  std::vector<float> sliding_inverse_frequencies;
  kernels::Stream stream;
  static ForwardContext Create(const ModelConfig& config, const kernels::Stream& stream);
};

// A sequence's rows in the batch and the keys and values that it attends to. `keys` and `values`
// have room for n_past + n_rows rows of kv_width floats, which follow one another or, with
// `blocks`, lie as in kernels::AttentionParams; ForwardLayer writes the last n_rows.
struct SequenceSlice {
  int64_t first_row = 0;
  int64_t n_rows = 0;
  int64_t n_past = 0;
  float* keys = nullptr;
  float* values = nullptr;
  const int32_t* blocks = nullptr;
  int64_t block_stride = 0;
};

absl::Status AttentionInput(const ForwardContext& context, const DecoderLayer& layer,
                            const float* hidden, int64_t n_tokens, float* normed);
// q [n_tokens, q_width], k and v [n_tokens, kv_width]; norm and RoPE applied to q and k.
absl::Status Project(const ForwardContext& context, const DecoderLayer& layer, const float* normed,
                     std::span<const int32_t> positions, float* q, float* k, float* v);
// q rows of each sequence against its keys and values (already holding the new rows).
absl::Status Attend(const ForwardContext& context, const DecoderLayer& layer, const float* q,
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
  // That Reserve takes.
  static int64_t SizeBytes(const ModelConfig& config, int64_t n_tokens);
  Matrix normed, q, k, v, attended, gate, up, out;
};

// All steps; copies the new keys and values to the sequences' caches.
absl::Status ForwardLayer(const ForwardContext& context, const DecoderLayer& layer,
                          std::span<const int32_t> positions,
                          std::span<const SequenceSlice> sequences, int64_t n_tokens, float* hidden,
                          ForwardScratch& scratch);

}  // namespace walsh
