#include "worker/io/model_config.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr char kLlama[] = "LlamaForCausalLM";
constexpr char kMistral[] = "MistralForCausalLM";
// What transformers' MistralConfig assumes where the key is absent.
constexpr int64_t kMistralSlidingWindowDefault = 4096;
constexpr int64_t kMistralKvHeadsDefault = 8;

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
  if (model_type == "llama") return std::string(kLlama);
  if (model_type == "mistral") return std::string(kMistral);
  return model_type;
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

// transformers 4 has rope_theta beside rope_scaling; transformers 5 has both in rope_parameters.
absl::Status ParseRope(const json& config, ModelConfig& out) {
  WALSH_ASSIGN_OR_RETURN(out.rope_theta, NumberOr(config, "rope_theta", 10000.0));
  for (const char* field : {"rope_scaling", "rope_parameters"}) {
    const json* object = Find(config, field);
    if (object == nullptr) continue;
    if (!object->is_object()) return WrongType(field, "an object", *object);
    WALSH_ASSIGN_OR_RETURN(out.rope_theta, NumberOr(*object, "rope_theta", out.rope_theta));
    WALSH_ASSIGN_OR_RETURN(const double share, NumberOr(*object, "partial_rotary_factor", 1.0));
    if (share != 1.0) {
      return absl::UnimplementedError(
          absl::StrCat("config.json: partial_rotary_factor ", share, " is not supported, only 1"));
    }
    WALSH_ASSIGN_OR_RETURN(out.rope_scaling, ParseRopeScaling(*object));
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

absl::Status CheckSlidingWindow(const json& config, const ModelConfig& out) {
  if (out.architecture != kMistral) return absl::OkStatus();
  const bool is_given = config.contains("sliding_window");
  const json* value = Find(config, "sliding_window");
  if (is_given && value == nullptr) return absl::OkStatus();
  int64_t window = kMistralSlidingWindowDefault;
  if (value != nullptr) {
    WALSH_ASSIGN_OR_RETURN(
        window, Integer("sliding_window", *value, 0, std::numeric_limits<int64_t>::max()));
  }
  if (window >= out.max_position) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      "config.json: sliding-window attention is not supported: sliding_window ", window,
      " is below max_position_embeddings ", out.max_position, is_given ? "" : " (the default)"));
}

absl::Status CheckActivation(const json& config) {
  WALSH_ASSIGN_OR_RETURN(const std::string activation, StringOr(config, "hidden_act", "silu"));
  if (activation == "silu") return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat("config.json: hidden_act '", activation, "' is not supported; supported: silu"));
}

absl::Status ParseShape(const json& config, ModelConfig& out) {
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
  const int64_t kv_default = out.architecture == kMistral ? kMistralKvHeadsDefault : out.n_heads;
  WALSH_ASSIGN_OR_RETURN(out.n_kv_heads,
                         IntegerOr(config, "num_key_value_heads", kv_default, limits::kHeadsMax));
  if (Find(config, "head_dim") == nullptr && out.hidden % out.n_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("config.json: hidden_size ", out.hidden,
                                                   " is no multiple of num_attention_heads ",
                                                   out.n_heads, ", and head_dim is missing"));
  }
  WALSH_ASSIGN_OR_RETURN(
      out.head_dim, IntegerOr(config, "head_dim", out.hidden / out.n_heads, limits::kHeadDimMax));
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
  return ValidateRopeScaling(config.rope_scaling, origin);
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view config_json) {
  WALSH_ASSIGN_OR_RETURN(const json config,
                         ParseBoundedJson("config.json", config_json,
                                          {.bytes_max = limits::kConfigFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  ModelConfig out;
  WALSH_ASSIGN_OR_RETURN(out.architecture, Architecture(config));
  if (out.architecture != kLlama && out.architecture != kMistral) {
    return absl::UnimplementedError(absl::StrCat("config.json: architecture '", out.architecture,
                                                 "' is not supported; supported: ", kLlama, ", ",
                                                 kMistral));
  }
  WALSH_RETURN_IF_ERROR(CheckActivation(config));
  WALSH_RETURN_IF_ERROR(ParseShape(config, out));
  WALSH_RETURN_IF_ERROR(CheckSlidingWindow(config, out));
  WALSH_ASSIGN_OR_RETURN(out.rms_norm_eps, NumberOr(config, "rms_norm_eps", 1e-6));
  WALSH_RETURN_IF_ERROR(ParseRope(config, out));
  WALSH_ASSIGN_OR_RETURN(out.tied_embeddings, BoolOr(config, "tie_word_embeddings", false));
  WALSH_ASSIGN_OR_RETURN(out.attention_bias, BoolOr(config, "attention_bias", false));
  WALSH_ASSIGN_OR_RETURN(out.mlp_bias, BoolOr(config, "mlp_bias", false));
  WALSH_RETURN_IF_ERROR(ParseSpecialTokens(config, out));
  WALSH_RETURN_IF_ERROR(ValidateModelConfig(out, "config.json"));
  return out;
}

const std::vector<std::string>& SupportedArchitectures() {
  static const std::vector<std::string> names = {kLlama, kMistral, "llama"};
  return names;
}

}  // namespace walsh
