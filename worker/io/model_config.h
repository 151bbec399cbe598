// The shape of a decoder-only transformer, from config.json or from GGUF metadata.
//
// Every field is range-checked against common/limits.h before anything is allocated.
#pragma once

#include <cstdint>
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

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "MistralForCausalLM"
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
  bool attention_bias = false;
  bool mlp_bias = false;
  int32_t bos_token = -1;  // -1: none
  std::vector<int32_t> eos_tokens;

  int64_t q_width() const { return n_heads * head_dim; }
  int64_t kv_width() const { return n_kv_heads * head_dim; }
};

// Errors: INVALID_ARGUMENT  a field is missing, of the wrong type or out of range (named)
//         UNIMPLEMENTED     an architecture or feature that walsh does not support; lists what it
//         does
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json);

// Range and consistency checks, whatever file the configuration came from. INVALID_ARGUMENT names
// `origin` (a file's name), the field, the limit and the value.
absl::Status ValidateModelConfig(const ModelConfig& config, const std::string& origin);

// As config.json's "architectures" and GGUF's "general.architecture" name them.
const std::vector<std::string>& SupportedArchitectures();

}  // namespace walsh
