// The shape of a decoder-only transformer, from config.json or from GGUF metadata.
//
// Families differ in fields here, not in code elsewhere: docs/models.md has the table.
//
// Every field is range-checked against common/limits.h before anything is allocated.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

struct RopeScaling {
  enum class Kind { kNone, kLinear, kLlama3 };
  Kind kind = Kind::kNone;
  double factor = 1.0;
  // kLlama3 only (Llama 3.1's config.json names them the same way).
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position = 8192;
  // GGUF files of Llama 3.1 carry the resulting divisors instead: [head_dim / 2], empty otherwise.
  std::vector<float> frequency_divisors;
};

// What the MLP does to its gate: x · σ(x), or GELU by its tanh formula.
enum class MlpActivation { kSilu, kGeluTanh };

struct ModelConfig {
  std::string architecture;  // one of kHfArchitectures
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t n_layers = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab = 0;
  int64_t max_position = 0;  // context in tokens
  double rms_norm_eps = 1e-5;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tied_embeddings = false;
  bool attention_bias = false;  // of q, k and v
  bool output_bias = false;     // of o
  bool mlp_bias = false;
  // RMSNorm of each head of q and k, before RoPE.
  bool has_qk_norm = false;
  // RMSNorm of what attention and MLP put out, before it is added to the residual stream. No
  // rotation of that stream can be folded through these (worker/rotate/fold.h).
  bool has_output_norms = false;
  // What HF's files leave out of every norm's weight: 1 where they hold γ and the norm multiplies
  // by 1 + γ. Checkpoints and artifacts add it on reading: all else sees what the norm multiplies
  // by.
  float norm_offset = 0;
  MlpActivation activation = MlpActivation::kSilu;
  double embedding_scale = 1;             // of looked-up rows, not of a tied head
  double query_pre_attention_scalar = 0;  // scores are divided by its root; 0: head_dim
  // Files hold q, k, v as one matrix, and gate, up as another; checkpoints show the parts.
  bool has_fused_linears = false;
  // How many tokens a token of a sliding layer sees, itself included; 0: all, in every layer.
  int64_t sliding_window = 0;
  std::vector<bool> sliding_layers;  // [n_layers]; empty: none
  double sliding_rope_theta = 0;     // of those layers, which have no scaling; 0: as the others
  int32_t bos_token = -1;            // -1: none
  std::vector<int32_t> eos_tokens;

  int64_t q_width() const { return n_heads * head_dim; }
  int64_t kv_width() const { return n_kv_heads * head_dim; }
  bool is_sliding(int64_t layer) const {
    return !sliding_layers.empty() && sliding_layers[static_cast<size_t>(layer)];
  }
  // The layer's window; 0: none.
  int64_t window(int64_t layer) const { return is_sliding(layer) ? sliding_window : 0; }
  // Of a layer's linear: "self_attn.q_proj".
  bool has_bias(std::string_view linear) const;
  // What scores are multiplied by.
  double attention_scale() const;
};

// Errors: INVALID_ARGUMENT  a field is missing, of the wrong type or out of range (named)
//         UNIMPLEMENTED     an architecture or feature that walsh does not support; lists what it
//         does
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json);

// Range and consistency checks, whatever file the configuration came from. INVALID_ARGUMENT names
// `origin` (a file's name), the field, the limit and the value.
absl::Status ValidateModelConfig(const ModelConfig& config, const std::string& origin);

// What follows from the architecture alone: norms, fused linears, activation, embedding scale.
void SetFamilyTraits(ModelConfig& config);
// A window that reaches over the whole context is none.
void DropIdleWindow(ModelConfig& config);

// UNIMPLEMENTED for what the file `origin` names, with the names that it could have had.
absl::Status UnsupportedArchitecture(const std::string& origin, const std::string& architecture,
                                     std::span<const std::string_view> supported);

}  // namespace walsh
