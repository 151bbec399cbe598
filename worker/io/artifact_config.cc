#include "worker/io/artifact_config.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr char kOwnGridMember[] = "walsh";

json RopeScalingJson(const RopeScaling& scaling) {
  switch (scaling.kind) {
    case RopeScaling::Kind::kNone:
      return nullptr;
    case RopeScaling::Kind::kLinear:
      return {{"rope_type", "linear"}, {"type", "linear"}, {"factor", scaling.factor}};
    case RopeScaling::Kind::kLlama3:
      return {{"rope_type", "llama3"},
              {"factor", scaling.factor},
              {"low_freq_factor", scaling.low_freq_factor},
              {"high_freq_factor", scaling.high_freq_factor},
              {"original_max_position_embeddings", scaling.original_max_position}};
  }
  return nullptr;
}

// What every family has.
json CommonConfig(const ModelConfig& c) {
  json config = {{"architectures", json::array({c.architecture})},
                 {"hidden_size", c.hidden},
                 {"intermediate_size", c.intermediate},
                 {"num_hidden_layers", c.n_layers},
                 {"num_attention_heads", c.n_heads},
                 {"num_key_value_heads", c.n_kv_heads},
                 {"head_dim", c.head_dim},
                 {"vocab_size", c.vocab},
                 {"max_position_embeddings", c.max_position},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", c.rms_norm_eps},
                 {"rope_theta", c.rope_theta},
                 {"rope_scaling", RopeScalingJson(c.rope_scaling)},
                 {"use_cache", true}};
  config["bos_token_id"] = c.bos_token < 0 ? json() : json(c.bos_token);
  if (c.eos_tokens.size() == 1) {
    config["eos_token_id"] = c.eos_tokens.front();
  } else {
    config["eos_token_id"] = c.eos_tokens.empty() ? json() : json(c.eos_tokens);
  }
  return config;
}

json LayerTypes(const ModelConfig& c) {
  json types = json::array();
  for (int64_t layer = 0; layer < c.n_layers; ++layer) {
    types.push_back(c.is_sliding(layer) ? "sliding_attention" : "full_attention");
  }
  return types;
}

void SetGemma3(const ModelConfig& c, json& config) {
  config["model_type"] = "gemma3_text";
  config.erase("hidden_act");
  config["hidden_activation"] = "gelu_pytorch_tanh";
  config["attention_bias"] = c.attention_bias;
  config["query_pre_attn_scalar"] = c.query_pre_attention_scalar;
  config["rope_local_base_freq"] = c.sliding_rope_theta;
  config["sliding_window"] = c.sliding_window > 0 ? c.sliding_window : c.max_position;
  config["layer_types"] = LayerTypes(c);
  config["attn_logit_softcapping"] = nullptr;
  config["final_logit_softcapping"] = nullptr;
}

// In the form of transformers 4, which 5 reads too.
json ConfigFromModel(const ModelConfig& c) {
  json config = CommonConfig(c);
  if (c.architecture == "Gemma3ForCausalLM") {
    SetGemma3(c, config);
  } else if (c.architecture == "Qwen2ForCausalLM" || c.architecture == "Qwen3ForCausalLM") {
    config["model_type"] = c.architecture == "Qwen2ForCausalLM" ? "qwen2" : "qwen3";
    config["attention_bias"] = c.attention_bias;
    config["use_sliding_window"] = c.sliding_window > 0;
    config["sliding_window"] = c.sliding_window > 0 ? json(c.sliding_window) : json();
    config["layer_types"] = LayerTypes(c);
  } else if (c.architecture == "MistralForCausalLM" || c.has_fused_linears) {
    // Fused linears are stored as their parts, which makes a Mistral of a Phi-3: the same function,
    // in the names that readers of GPTQ checkpoints know.
    config["architectures"] = json::array({"MistralForCausalLM"});
    config["model_type"] = "mistral";
    config["sliding_window"] = c.sliding_window > 0 ? json(c.sliding_window) : json();
  } else {
    config["model_type"] = "llama";
    config["attention_bias"] = c.attention_bias;
    config["mlp_bias"] = c.mlp_bias;
  }
  return config;
}

absl::Status Unsupported(const std::string& message) {
  return absl::UnimplementedError(absl::StrCat("config.json: quantization_config: ", message));
}

}  // namespace

absl::StatusOr<json> ArtifactConfig(const Checkpoint& source) {
  json config;
  const auto it = source.side_files().find("config.json");
  if (it == source.side_files().end() || source.config().has_fused_linears) {
    config = ConfigFromModel(source.config());
  } else {
    WALSH_ASSIGN_OR_RETURN(config, ParseBoundedJson("config.json", it->second,
                                                    {.bytes_max = limits::kConfigFileBytesMax,
                                                     .depth_max = limits::kJsonDepthMax}));
  }
  config["tie_word_embeddings"] = false;
  // transformers 5 calls it dtype.
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = "bfloat16";
  return config;
}

absl::StatusOr<StoredGrid> ParseStoredGrid(const json& quantization_config) {
  const auto it = quantization_config.find(kOwnGridMember);
  if (it == quantization_config.end()) return StoredGrid::kGptq;
  const auto unsupported = [&](const char* rule) {
    return Unsupported(
        absl::StrCat("'", kOwnGridMember, "' is ", it->dump().substr(0, 64), ", ", rule));
  };
  if (!it->is_object() || it->size() != 2 || !it->contains("grid") || !it->contains("bits")) {
    return unsupported("only an object of 'grid' and 'bits' is supported");
  }
  const json& bits = (*it)["bits"];
  if ((*it)["grid"] == "codebook") {
    if (bits != 2) return unsupported("a codebook is of 2 bits");
    return StoredGrid::kCodebook;
  }
  if ((*it)["grid"] == "float-zero") {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
      return unsupported("bits must be 2, 3, 4 or 8");
    }
    return StoredGrid::kFloatZeros;
  }
  return unsupported("only the grids codebook and float-zero are known");
}

absl::Status CheckQuantizationConfig(const json& config) {
  const auto it = config.find("quantization_config");
  if (it == config.end() || !it->is_object()) {
    return absl::InvalidArgumentError("config.json: field 'quantization_config' is missing");
  }
  const json& q = *it;
  const auto require = [&](const char* field, const json& expected) -> absl::Status {
    const auto value = q.find(field);
    if (value != q.end() && *value == expected) return absl::OkStatus();
    return Unsupported(absl::StrCat("'", field, "' is ",
                                    value == q.end() ? "missing" : value->dump().substr(0, 64),
                                    ", only ", expected.dump(), " is supported"));
  };
  const auto order = q.find("desc_act");
  if (order == q.end() || !order->is_boolean()) {
    return Unsupported("'desc_act' must be true or false");
  }
  WALSH_RETURN_IF_ERROR(require("lm_head", false));
  const auto online = q.find("online_transforms");
  const bool is_online = online != q.end() && !online->is_null() && !online->empty();
  if (!is_online) {
    WALSH_RETURN_IF_ERROR(require("quant_method", "gptq"));
  } else if (q.contains("quant_method")) {
    // Without the transforms the weights give nonsense: an artifact that another program would take
    // for plain GPTQ is not one of ours.
    return Unsupported("'quant_method' beside online transforms is not supported");
  }
  WALSH_ASSIGN_OR_RETURN(const StoredGrid grid, ParseStoredGrid(q));
  return require("checkpoint_format",
                 is_online || grid != StoredGrid::kGptq ? kWalshFormat : kGptqFormat);
}

}  // namespace walsh
