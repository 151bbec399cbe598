#include "worker/io/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/architectures.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"

namespace walsh {
namespace {

using nlohmann::json;

// Which layers attend to a window only.
enum class Sliding {
  kNever,
  kEveryLayer,   // where a window is given
  kUpperLayers,  // those from max_window_layers on, where use_sliding_window says so
  kPattern,      // all but every sixth
};

// What transformers knows of an architecture without being told, and assumes where a key is absent.
struct Family {
  std::string_view architecture;
  std::string_view model_type;
  int64_t kv_heads = 0;  // 0: as many as heads
  int64_t head_dim = 0;  // 0: hidden_size / num_attention_heads
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  double sliding_rope_theta = 0;
  bool tied_embeddings = false;
  Sliding sliding = Sliding::kNever;
  int64_t sliding_window = 0;  // 0: none
};
constexpr Family kLlama = {.architecture = "LlamaForCausalLM", .model_type = "llama"};
constexpr Family kMistral = {.architecture = "MistralForCausalLM",
                             .model_type = "mistral",
                             .kv_heads = 8,
                             .sliding = Sliding::kEveryLayer,
                             .sliding_window = 4096};
constexpr Family kQwen2 = {.architecture = "Qwen2ForCausalLM",
                           .model_type = "qwen2",
                           .kv_heads = 32,
                           .sliding = Sliding::kUpperLayers,
                           .sliding_window = 4096};
constexpr Family kQwen3 = {.architecture = "Qwen3ForCausalLM",
                           .model_type = "qwen3",
                           .kv_heads = 32,
                           .head_dim = 128,
                           .sliding = Sliding::kUpperLayers,
                           .sliding_window = 4096};
constexpr Family kPhi3 = {.architecture = "Phi3ForCausalLM",
                          .model_type = "phi3",
                          .rms_norm_eps = 1e-5,
                          .sliding = Sliding::kEveryLayer};
constexpr Family kGemma3 = {.architecture = "Gemma3ForCausalLM",
                            .model_type = "gemma3_text",
                            .kv_heads = 4,
                            .head_dim = 256,
                            .rope_theta = 1e6,
                            .sliding_rope_theta = 1e4,
                            .tied_embeddings = true,
                            .sliding = Sliding::kPattern,
                            .sliding_window = 4096};
constexpr std::array<const Family*, kHfArchitectures.size()> kFamilies = {
    &kLlama, &kMistral, &kQwen2, &kQwen3, &kPhi3, &kGemma3};
constexpr int64_t kMaxWindowLayersDefault = 28;
constexpr int64_t kGemma3Pattern = 6;

std::string Name(const char* field) { return absl::StrCat("config.json: field '", field, "'"); }

// A member of `object`; null counts as absent.
const json* Find(const json& object, const char* field) {
  const auto it = object.find(field);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

absl::Status WrongType(const char* field, const char* expected, const json& value) {
  return absl::InvalidArgumentError(
      absl::StrCat(Name(field), " is not ", expected, " but of type ", value.type_name()));
}

absl::StatusOr<int64_t> Integer(const char* field, const json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return WrongType(field, "an integer", value);
  const bool is_large =
      value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (is_large || value.get<int64_t>() < min || value.get<int64_t>() > max) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(field), " is ", value.dump(), ", must be ", min, " to ", max));
  }
  return value.get<int64_t>();
}

absl::StatusOr<int64_t> RequiredInteger(const json& object, const char* field, int64_t max) {
  const json* value = Find(object, field);
  if (value == nullptr) return absl::InvalidArgumentError(absl::StrCat(Name(field), " is missing"));
  return Integer(field, *value, 1, max);
}

absl::StatusOr<int64_t> IntegerOr(const json& object, const char* field, int64_t fallback,
                                  int64_t max) {
  const json* value = Find(object, field);
  if (value == nullptr) return fallback;
  return Integer(field, *value, 1, max);
}

absl::StatusOr<bool> BoolOr(const json& object, const char* field, bool fallback) {
  const json* value = Find(object, field);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return WrongType(field, "a boolean", *value);
  return value->get<bool>();
}

absl::StatusOr<std::string> StringOr(const json& object, const char* field, const char* fallback) {
  const json* value = Find(object, field);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) return WrongType(field, "a string", *value);
  return value->get<std::string>();
}

absl::StatusOr<double> NumberOr(const json& object, const char* field, double fallback) {
  const json* value = Find(object, field);
  if (value == nullptr) return fallback;
  if (!value->is_number()) return WrongType(field, "a number", *value);
  return value->get<double>();
}

absl::StatusOr<double> RequiredNumber(const json& object, const char* field) {
  if (Find(object, field) == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(Name(field), " is missing"));
  }
  return NumberOr(object, field, 0);
}

// architectures[0]; files of old transformers have only model_type.
absl::StatusOr<std::string> Architecture(const json& config) {
  if (const json* list = Find(config, "architectures"); list != nullptr) {
    if (!list->is_array() || list->empty() || !list->front().is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(Name("architectures"), " is not a list of names"));
    }
    return list->front().get<std::string>();
  }
  WALSH_ASSIGN_OR_RETURN(const std::string model_type, StringOr(config, "model_type", ""));
  if (model_type.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(Name("architectures"), " is missing"));
  }
  for (const Family* family : kFamilies) {
    if (family->model_type == model_type) return std::string(family->architecture);
  }
  return model_type;
}

absl::StatusOr<const Family*> FamilyOf(const json& config) {
  WALSH_ASSIGN_OR_RETURN(const std::string architecture, Architecture(config));
  for (const Family* family : kFamilies) {
    if (family->architecture == architecture) return family;
  }
  return UnsupportedArchitecture("config.json", architecture, kHfArchitectures);
}

absl::StatusOr<RopeScaling> ParseRopeScaling(const json& object) {
  WALSH_ASSIGN_OR_RETURN(const std::string old_name, StringOr(object, "type", "default"));
  WALSH_ASSIGN_OR_RETURN(const std::string kind, StringOr(object, "rope_type", old_name.c_str()));
  RopeScaling scaling;
  if (kind == "default") return scaling;
  if (kind != "linear" && kind != "llama3") {
    return absl::UnimplementedError(absl::StrCat("config.json: RoPE scaling '", kind,
                                                 "' is not supported; supported: default, linear, "
                                                 "llama3"));
  }
  WALSH_ASSIGN_OR_RETURN(scaling.factor, RequiredNumber(object, "factor"));
  if (kind == "linear") {
    scaling.kind = RopeScaling::Kind::kLinear;
    return scaling;
  }
  scaling.kind = RopeScaling::Kind::kLlama3;
  WALSH_ASSIGN_OR_RETURN(scaling.low_freq_factor, RequiredNumber(object, "low_freq_factor"));
  WALSH_ASSIGN_OR_RETURN(scaling.high_freq_factor, RequiredNumber(object, "high_freq_factor"));
  WALSH_ASSIGN_OR_RETURN(
      scaling.original_max_position,
      RequiredInteger(object, "original_max_position_embeddings", limits::kContextMax));
  return scaling;
}

absl::Status CheckWholeRotary(const json& object) {
  WALSH_ASSIGN_OR_RETURN(const double share, NumberOr(object, "partial_rotary_factor", 1.0));
  if (share == 1.0) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat("config.json: partial_rotary_factor ", share, " is not supported, only 1"));
}

absl::Status ParseRopeParameters(const json& object, double& theta, RopeScaling& scaling) {
  WALSH_RETURN_IF_ERROR(CheckWholeRotary(object));
  WALSH_ASSIGN_OR_RETURN(theta, NumberOr(object, "rope_theta", theta));
  WALSH_ASSIGN_OR_RETURN(scaling, ParseRopeScaling(object));
  return absl::OkStatus();
}

// The form of transformers 5 for layers that differ: {"full_attention": {…}, "sliding_attention":
// {…}}.
absl::Status ParseRopeByLayerType(const json& object, ModelConfig& out) {
  for (const auto& [type, parameters] : object.items()) {
    if (!parameters.is_object()) return WrongType(type.c_str(), "an object", parameters);
    if (type == "full_attention") {
      WALSH_RETURN_IF_ERROR(ParseRopeParameters(parameters, out.rope_theta, out.rope_scaling));
    } else if (type == "sliding_attention") {
      RopeScaling scaling;
      if (out.sliding_rope_theta == 0) out.sliding_rope_theta = out.rope_theta;
      WALSH_RETURN_IF_ERROR(ParseRopeParameters(parameters, out.sliding_rope_theta, scaling));
      if (scaling.kind != RopeScaling::Kind::kNone) {
        return absl::UnimplementedError(
            "config.json: RoPE scaling of sliding_attention layers is not supported");
      }
    } else {
      return absl::UnimplementedError(absl::StrCat("config.json: RoPE of layers of type '",
                                                   type.substr(0, 64), "' is not supported"));
    }
  }
  return absl::OkStatus();
}

// transformers 4 has rope_theta beside rope_scaling; transformers 5 has both in rope_parameters.
absl::Status ParseRope(const json& config, const Family& family, ModelConfig& out) {
  WALSH_RETURN_IF_ERROR(CheckWholeRotary(config));
  WALSH_ASSIGN_OR_RETURN(out.rope_theta, NumberOr(config, "rope_theta", family.rope_theta));
  if (family.sliding_rope_theta > 0) {
    WALSH_ASSIGN_OR_RETURN(out.sliding_rope_theta,
                           NumberOr(config, "rope_local_base_freq", family.sliding_rope_theta));
  }
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    const json* object = Find(config, field);
    if (object == nullptr) continue;
    if (!object->is_object()) return WrongType(field, "an object", *object);
    if (object->contains("full_attention") || object->contains("sliding_attention")) {
      WALSH_RETURN_IF_ERROR(ParseRopeByLayerType(*object, out));
    } else {
      WALSH_RETURN_IF_ERROR(ParseRopeParameters(*object, out.rope_theta, out.rope_scaling));
    }
  }
  return absl::OkStatus();
}

absl::Status ParseSpecialTokens(const json& config, ModelConfig& out) {
  const json* bos = Find(config, "bos_token_id");
  if (bos != nullptr) {
    WALSH_ASSIGN_OR_RETURN(const int64_t id, Integer("bos_token_id", *bos, -1, out.vocab - 1));
    out.bos_token = static_cast<int32_t>(id);
  }
  const json* eos = Find(config, "eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  const json list = eos->is_array() ? *eos : json::array({*eos});
  if (list.size() > static_cast<size_t>(limits::kStopTokensMax)) {
    return absl::InvalidArgumentError(absl::StrCat(Name("eos_token_id"), " has ", list.size(),
                                                   " entries, at most ", limits::kStopTokensMax));
  }
  for (const json& entry : list) {
    WALSH_ASSIGN_OR_RETURN(const int64_t id, Integer("eos_token_id", entry, 0, out.vocab - 1));
    out.eos_tokens.push_back(static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

// Layers by their names in "layer_types".
absl::StatusOr<std::vector<bool>> SlidingByName(const json& types, const ModelConfig& out) {
  if (!types.is_array() || static_cast<int64_t>(types.size()) != out.n_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name("layer_types"), " is not a list of ", out.n_layers, " names"));
  }
  std::vector<bool> sliding;
  for (const json& type : types) {
    if (type != "sliding_attention" && type != "full_attention") {
      return absl::UnimplementedError(
          absl::StrCat(Name("layer_types"), " has ",
                       type.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 64),
                       ", supported: full_attention, sliding_attention"));
    }
    sliding.push_back(type == "sliding_attention");
  }
  return sliding;
}

absl::StatusOr<std::vector<bool>> SlidingLayers(const json& config, const Family& family,
                                                const ModelConfig& out) {
  std::vector<bool> sliding(static_cast<size_t>(out.n_layers), true);
  if (family.sliding == Sliding::kEveryLayer) return sliding;
  if (const json* types = Find(config, "layer_types"); types != nullptr) {
    return SlidingByName(*types, out);
  }
  if (family.sliding == Sliding::kUpperLayers) {
    const json* value = Find(config, "max_window_layers");
    int64_t first = kMaxWindowLayersDefault;
    if (value != nullptr) {
      WALSH_ASSIGN_OR_RETURN(first, Integer("max_window_layers", *value, 0, limits::kLayersMax));
    }
    std::fill_n(sliding.begin(), std::min(first, out.n_layers), false);
    return sliding;
  }
  WALSH_ASSIGN_OR_RETURN(const int64_t pattern, IntegerOr(config, "sliding_window_pattern",
                                                          kGemma3Pattern, limits::kLayersMax));
  for (int64_t i = pattern - 1; i < out.n_layers; i += pattern) {
    sliding[static_cast<size_t>(i)] = false;
  }
  return sliding;
}

absl::Status ParseSlidingWindow(const json& config, const Family& family, ModelConfig& out) {
  if (family.sliding == Sliding::kNever) return absl::OkStatus();
  if (family.sliding == Sliding::kUpperLayers) {
    WALSH_ASSIGN_OR_RETURN(const bool is_used, BoolOr(config, "use_sliding_window", false));
    if (!is_used) return absl::OkStatus();
  }
  const bool is_none = config.contains("sliding_window") && config["sliding_window"].is_null();
  if (is_none || (family.sliding_window == 0 && !config.contains("sliding_window"))) {
    return absl::OkStatus();
  }
  WALSH_ASSIGN_OR_RETURN(out.sliding_window,
                         IntegerOr(config, "sliding_window", family.sliding_window,
                                   std::numeric_limits<int64_t>::max()));
  WALSH_ASSIGN_OR_RETURN(out.sliding_layers, SlidingLayers(config, family, out));
  DropIdleWindow(out);
  return absl::OkStatus();
}

absl::Status CheckActivation(const json& config, const Family& family) {
  const bool is_gemma = &family == &kGemma3;
  const char* field = is_gemma ? "hidden_activation" : "hidden_act";
  const char* supported = is_gemma ? "gelu_pytorch_tanh" : "silu";
  WALSH_ASSIGN_OR_RETURN(const std::string activation, StringOr(config, field, supported));
  if (activation == supported) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat("config.json: ", field, " '", activation,
                                               "' is not supported; supported: ", supported));
}

absl::Status ParseGemma3(const json& config, ModelConfig& out) {
  for (const char* field : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    if (const json* value = Find(config, field); value != nullptr) {
      return absl::UnimplementedError(
          absl::StrCat("config.json: ", field, " is not supported, only null"));
    }
  }
  WALSH_ASSIGN_OR_RETURN(const bool is_bidirectional,
                         BoolOr(config, "use_bidirectional_attention", false));
  if (is_bidirectional) {
    return absl::UnimplementedError(
        "config.json: use_bidirectional_attention is not supported, only false");
  }
  WALSH_ASSIGN_OR_RETURN(out.query_pre_attention_scalar,
                         NumberOr(config, "query_pre_attn_scalar", kGemma3.head_dim));
  if (out.query_pre_attention_scalar > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      Name("query_pre_attn_scalar"), " is ", out.query_pre_attention_scalar, ", must be above 0"));
}

absl::Status ParseBiases(const json& config, ModelConfig& out) {
  if (out.architecture == kQwen2.architecture) {
    out.attention_bias = true;
    return absl::OkStatus();
  }
  if (out.architecture == kPhi3.architecture) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(out.attention_bias, BoolOr(config, "attention_bias", false));
  out.output_bias = out.attention_bias;
  if (out.architecture == kLlama.architecture || out.architecture == kMistral.architecture) {
    WALSH_ASSIGN_OR_RETURN(out.mlp_bias, BoolOr(config, "mlp_bias", false));
  }
  return absl::OkStatus();
}

absl::Status ParseShape(const json& config, const Family& family, ModelConfig& out) {
  WALSH_ASSIGN_OR_RETURN(out.hidden, RequiredInteger(config, "hidden_size", limits::kHiddenMax));
  WALSH_ASSIGN_OR_RETURN(out.intermediate,
                         RequiredInteger(config, "intermediate_size", limits::kIntermediateMax));
  WALSH_ASSIGN_OR_RETURN(out.n_layers,
                         RequiredInteger(config, "num_hidden_layers", limits::kLayersMax));
  WALSH_ASSIGN_OR_RETURN(out.n_heads,
                         RequiredInteger(config, "num_attention_heads", limits::kHeadsMax));
  WALSH_ASSIGN_OR_RETURN(out.vocab, RequiredInteger(config, "vocab_size", limits::kVocabMax));
  WALSH_ASSIGN_OR_RETURN(out.max_position,
                         RequiredInteger(config, "max_position_embeddings", limits::kContextMax));
  const int64_t kv_default = family.kv_heads > 0 ? family.kv_heads : out.n_heads;
  WALSH_ASSIGN_OR_RETURN(out.n_kv_heads,
                         IntegerOr(config, "num_key_value_heads", kv_default, limits::kHeadsMax));
  if (Find(config, "head_dim") == nullptr && family.head_dim == 0 &&
      out.hidden % out.n_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("config.json: hidden_size ", out.hidden,
                                                   " is no multiple of num_attention_heads ",
                                                   out.n_heads, ", and head_dim is missing"));
  }
  const int64_t head_dim = family.head_dim > 0 ? family.head_dim : out.hidden / out.n_heads;
  WALSH_ASSIGN_OR_RETURN(out.head_dim,
                         IntegerOr(config, "head_dim", head_dim, limits::kHeadDimMax));
  return absl::OkStatus();
}

absl::Status OutOfRange(const std::string& origin, const char* what, double value,
                        const char* rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(origin, ": ", what, " is ", value, ", must be ", rule));
}

absl::Status ValidateRopeScaling(const RopeScaling& scaling, const std::string& origin) {
  constexpr double kFactorMax = 1e6;
  if (!(scaling.factor > 0 && scaling.factor <= kFactorMax)) {
    return OutOfRange(origin, "the RoPE scaling factor", scaling.factor, "above 0 and at most 1e6");
  }
  if (scaling.kind != RopeScaling::Kind::kLlama3) return absl::OkStatus();
  if (!(scaling.low_freq_factor > 0 && scaling.low_freq_factor <= kFactorMax)) {
    return OutOfRange(origin, "low_freq_factor", scaling.low_freq_factor,
                      "above 0 and at most 1e6");
  }
  if (!(scaling.high_freq_factor > scaling.low_freq_factor &&
        scaling.high_freq_factor <= kFactorMax)) {
    return OutOfRange(origin, "high_freq_factor", scaling.high_freq_factor,
                      "above low_freq_factor and at most 1e6");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateModelConfig(const ModelConfig& config, const std::string& origin) {
  struct Bound {
    const char* what;
    int64_t value;
    int64_t max;
  };
  const Bound bounds[] = {
      {"the hidden width", config.hidden, limits::kHiddenMax},
      {"the intermediate width", config.intermediate, limits::kIntermediateMax},
      {"the number of layers", config.n_layers, limits::kLayersMax},
      {"the number of heads", config.n_heads, limits::kHeadsMax},
      {"the number of KV heads", config.n_kv_heads, limits::kHeadsMax},
      {"the head width", config.head_dim, limits::kHeadDimMax},
      {"the vocabulary", config.vocab, limits::kVocabMax},
      {"the context length", config.max_position, limits::kContextMax},
  };
  for (const Bound& bound : bounds) {
    if (bound.value < 1 || bound.value > bound.max) {
      return absl::InvalidArgumentError(absl::StrCat(origin, ": ", bound.what, " is ", bound.value,
                                                     ", must be 1 to ", bound.max));
    }
  }
  if (config.n_heads % config.n_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": ", config.n_heads,
                                                   " attention heads are no multiple of ",
                                                   config.n_kv_heads, " KV heads"));
  }
  if (config.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(origin, ": the head width ", config.head_dim, " is odd; RoPE needs pairs"));
  }
  if (config.q_width() > limits::kHiddenMax) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": ", config.n_heads, " heads of ",
                                                   config.head_dim, " are ", config.q_width(),
                                                   " wide, at most ", limits::kHiddenMax));
  }
  if (!(config.rms_norm_eps >= 0 && config.rms_norm_eps < 1)) {
    return OutOfRange(origin, "the RMSNorm epsilon", config.rms_norm_eps, "0 or more and below 1");
  }
  if (!(config.rope_theta >= 1 && config.rope_theta <= 1e12)) {
    return OutOfRange(origin, "the RoPE base", config.rope_theta, "1 to 1e12");
  }
  if (config.sliding_rope_theta != 0 &&
      !(config.sliding_rope_theta >= 1 && config.sliding_rope_theta <= 1e12)) {
    return OutOfRange(origin, "the RoPE base of sliding layers", config.sliding_rope_theta,
                      "1 to 1e12");
  }
  // 0: the head's width.
  const double scalar = config.query_pre_attention_scalar;
  if (scalar != 0 && !(scalar >= limits::kQueryPreAttentionScalarMin &&
                       scalar <= limits::kQueryPreAttentionScalarMax)) {
    return OutOfRange(origin, "query_pre_attn_scalar", scalar, "1 to 1e6");
  }
  return ValidateRopeScaling(config.rope_scaling, origin);
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json) {
  WALSH_ASSIGN_OR_RETURN(const json config,
                         ParseBoundedJson("config.json", config_json,
                                          {.bytes_max = limits::kConfigFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  WALSH_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  ModelConfig out;
  out.architecture = std::string(family->architecture);
  WALSH_RETURN_IF_ERROR(CheckActivation(config, *family));
  WALSH_RETURN_IF_ERROR(ParseShape(config, *family, out));
  SetFamilyTraits(out);
  if (family == &kGemma3) WALSH_RETURN_IF_ERROR(ParseGemma3(config, out));
  WALSH_ASSIGN_OR_RETURN(out.rms_norm_eps, NumberOr(config, "rms_norm_eps", family->rms_norm_eps));
  WALSH_RETURN_IF_ERROR(ParseRope(config, *family, out));
  WALSH_RETURN_IF_ERROR(ParseSlidingWindow(config, *family, out));
  WALSH_ASSIGN_OR_RETURN(out.tied_embeddings,
                         BoolOr(config, "tie_word_embeddings", family->tied_embeddings));
  WALSH_RETURN_IF_ERROR(ParseBiases(config, out));
  WALSH_RETURN_IF_ERROR(ParseSpecialTokens(config, out));
  WALSH_RETURN_IF_ERROR(ValidateModelConfig(out, "config.json"));
  return out;
}

void SetFamilyTraits(ModelConfig& config) {
  const bool is_gemma = config.architecture == kGemma3.architecture;
  config.has_qk_norm = is_gemma || config.architecture == kQwen3.architecture;
  config.has_fused_linears = config.architecture == kPhi3.architecture;
  config.has_output_norms = is_gemma;
  config.norm_offset = is_gemma ? 1.0f : 0.0f;
  config.activation = is_gemma ? MlpActivation::kGeluTanh : MlpActivation::kSilu;
  config.embedding_scale = is_gemma ? std::sqrt(static_cast<double>(config.hidden)) : 1.0;
}

void DropIdleWindow(ModelConfig& config) {
  const std::vector<bool>& layers = config.sliding_layers;
  const bool is_sliding = std::find(layers.begin(), layers.end(), true) != layers.end();
  if (!is_sliding || config.sliding_window >= config.max_position) config.sliding_window = 0;
  if (!is_sliding || (config.sliding_window == 0 && config.sliding_rope_theta == 0)) {
    config.sliding_layers.clear();
  }
}

bool ModelConfig::has_bias(std::string_view linear) const {
  if (linear == "self_attn.o_proj") return output_bias;
  return linear.substr(0, 4) == "mlp." ? mlp_bias : attention_bias;
}

double ModelConfig::attention_scale() const {
  const double divisor =
      query_pre_attention_scalar > 0 ? query_pre_attention_scalar : static_cast<double>(head_dim);
  return 1.0 / std::sqrt(divisor);
}

absl::Status UnsupportedArchitecture(const std::string& origin, const std::string& architecture,
                                     std::span<const std::string_view> supported) {
  std::string names;
  for (const std::string_view name : supported) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(name));
  }
  return absl::UnimplementedError(absl::StrCat(origin, ": architecture '",
                                               architecture.substr(0, 64),
                                               "' is not supported; supported: ", names));
}

}  // namespace walsh
