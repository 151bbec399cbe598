#include "worker/io/gguf_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/architectures.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/checkpoint.h"
#include "worker/io/stored_tensor.h"

namespace walsh {
namespace {

constexpr char kRopeFreqs[] = "rope_freqs.weight";
constexpr std::array<const char*, 2> kLongRopeFactors = {"rope_factors_long.weight",
                                                         "rope_factors_short.weight"};
// What llama.cpp knows of Gemma 3 without the file's saying so: all but every sixth layer slide,
// with their own RoPE base; the 27B model, told by its layers, divides scores by the root of
// hidden / heads.
constexpr int64_t kGemma3Pattern = 6;
constexpr double kGemma3SlidingRopeTheta = 10000.0;
constexpr int64_t kGemma3LayersOf27B = 62;
// Where there is no rope.freq_base.
constexpr double kRopeThetaDefault = 10000.0;

// Typed access to metadata, with the key in every message.
class Keys {
 public:
  Keys(const std::string& file, const GgufContents& contents) : file_(file), contents_(contents) {
    architecture_ = GgufStringOrEmpty(contents, "general.architecture");
  }

  const std::string& architecture() const { return architecture_; }
  // "qwen2.block_count"
  std::string Of(const char* key) const { return absl::StrCat(architecture_, ".", key); }

  const GgufValue* Find(std::string_view key) const {
    const auto it = contents_.metadata.find(key);
    return it == contents_.metadata.end() ? nullptr : &it->second;
  }
  bool Has(std::string_view key) const { return Find(key) != nullptr; }

  template <typename T>
  absl::StatusOr<T> Get(const std::string& key, const char* type) const {
    const GgufValue* value = Find(key);
    if (value == nullptr) return Bad(key, "is missing");
    const T* typed = std::get_if<T>(value);
    if (typed == nullptr) return Bad(key, absl::StrCat("is not ", type));
    return *typed;
  }
  template <typename T>
  absl::StatusOr<T> GetOr(const std::string& key, const char* type, T fallback) const {
    if (!Has(key)) return fallback;
    return Get<T>(key, type);
  }

  absl::StatusOr<int64_t> Integer(const std::string& key, int64_t max) const {
    WALSH_ASSIGN_OR_RETURN(const int64_t value, Get<int64_t>(key, "an integer"));
    if (value >= 1 && value <= max) return value;
    return Bad(key, absl::StrCat("is ", value, ", must be 1 to ", max));
  }
  absl::StatusOr<int64_t> IntegerOr(const std::string& key, int64_t fallback, int64_t max) const {
    if (!Has(key)) return fallback;
    return Integer(key, max);
  }

  absl::Status Bad(const std::string& key, const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat(file_, ": key '", key, "' ", message));
  }
  absl::Status Unsupported(const std::string& message) const {
    return absl::UnimplementedError(absl::StrCat(file_, ": ", message));
  }

 private:
  const std::string& file_;
  const GgufContents& contents_;
  std::string architecture_;
};

const GgufTensor* FindTensor(const GgufContents& contents, std::string_view name) {
  const auto it = std::find_if(contents.tensors.begin(), contents.tensors.end(),
                               [&](const GgufTensor& t) { return t.name == name; });
  return it == contents.tensors.end() ? nullptr : &*it;
}

absl::Status CheckArchitecture(const std::string& file, const Keys& keys) {
  WALSH_RETURN_IF_ERROR(keys.Get<std::string>("general.architecture", "a string").status());
  if (std::find(kGgufArchitectures.begin(), kGgufArchitectures.end(), keys.architecture()) ==
      kGgufArchitectures.end()) {
    return UnsupportedArchitecture(file, keys.architecture(), kGgufArchitectures);
  }
  WALSH_ASSIGN_OR_RETURN(const int64_t n_experts,
                         keys.GetOr<int64_t>(keys.Of("expert_count"), "an integer", 0));
  if (n_experts == 0) return absl::OkStatus();
  return keys.Unsupported(absl::StrCat("mixtures of experts are not supported (", n_experts, ")"));
}

absl::Status ReadShape(const Keys& keys, ModelConfig& out) {
  WALSH_ASSIGN_OR_RETURN(out.hidden, keys.Integer(keys.Of("embedding_length"), limits::kHiddenMax));
  WALSH_ASSIGN_OR_RETURN(out.intermediate,
                         keys.Integer(keys.Of("feed_forward_length"), limits::kIntermediateMax));
  WALSH_ASSIGN_OR_RETURN(out.n_layers, keys.Integer(keys.Of("block_count"), limits::kLayersMax));
  WALSH_ASSIGN_OR_RETURN(out.n_heads,
                         keys.Integer(keys.Of("attention.head_count"), limits::kHeadsMax));
  WALSH_ASSIGN_OR_RETURN(out.n_kv_heads, keys.IntegerOr(keys.Of("attention.head_count_kv"),
                                                        out.n_heads, limits::kHeadsMax));
  WALSH_ASSIGN_OR_RETURN(out.max_position,
                         keys.Integer(keys.Of("context_length"), limits::kContextMax));
  if (!keys.Has(keys.Of("attention.key_length")) && out.hidden % out.n_heads != 0) {
    return keys.Bad(
        keys.Of("attention.key_length"),
        absl::StrCat("is missing and ", out.hidden, " is no multiple of ", out.n_heads, " heads"));
  }
  WALSH_ASSIGN_OR_RETURN(out.head_dim,
                         keys.IntegerOr(keys.Of("attention.key_length"), out.hidden / out.n_heads,
                                        limits::kHeadDimMax));
  for (const std::string& key :
       {keys.Of("attention.value_length"), keys.Of("rope.dimension_count")}) {
    WALSH_ASSIGN_OR_RETURN(const int64_t width,
                           keys.IntegerOr(key, out.head_dim, limits::kHeadDimMax));
    if (width != out.head_dim) {
      return keys.Unsupported(absl::StrCat("key '", key, "' is ", width, ", only the head width ",
                                           out.head_dim, " is supported"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> ReadRopeDivisors(const RandomAccessFile& file,
                                                    const GgufTensor& tensor, int64_t head_dim) {
  if (tensor.dims.size() != 1 || tensor.dims[0] != head_dim / 2) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": tensor '", kRopeFreqs,
                                                   "' must have ", head_dim / 2, " elements"));
  }
  const StoredTensor stored{.name = tensor.name,
                            .type = tensor.type,
                            .offset = tensor.offset,
                            .rows = 1,
                            .cols = tensor.dims[0],
                            .is_one_dimensional = true};
  WALSH_ASSIGN_OR_RETURN(const Matrix divisors, ReadStoredRows(file, stored, 0, 1));
  return std::vector<float>(divisors.span().begin(), divisors.span().end());
}

absl::Status ReadRope(const RandomAccessFile& file, const GgufContents& contents, const Keys& keys,
                      ModelConfig& out) {
  WALSH_ASSIGN_OR_RETURN(
      out.rope_theta, keys.GetOr<double>(keys.Of("rope.freq_base"), "a float", kRopeThetaDefault));
  // As llama.cpp reads them: linear unless the file names another kind, and a factor of 0 is none.
  WALSH_ASSIGN_OR_RETURN(
      const std::string kind,
      keys.GetOr<std::string>(keys.Of("rope.scaling.type"), "a string", std::string("linear")));
  if (kind == "linear") {
    // The key of files older than rope.scaling.*.
    WALSH_ASSIGN_OR_RETURN(const double old_factor,
                           keys.GetOr<double>(keys.Of("rope.scale_linear"), "a float", 0.0));
    WALSH_ASSIGN_OR_RETURN(const double factor, keys.GetOr<double>(keys.Of("rope.scaling.factor"),
                                                                   "a float", double{old_factor}));
    if (factor != 0.0 && factor != 1.0) {
      out.rope_scaling = {.kind = RopeScaling::Kind::kLinear, .factor = factor};
    }
  } else if (kind != "none") {
    return keys.Unsupported(absl::StrCat("RoPE scaling '", kind.substr(0, 64),
                                         "' is not supported; supported: none, linear, and "
                                         "llama3 by rope_freqs.weight"));
  }
  for (const char* name : kLongRopeFactors) {
    if (FindTensor(contents, name) == nullptr) continue;
    return keys.Unsupported(absl::StrCat("RoPE scaling 'longrope' (", name,
                                         ") is not supported; supported: none, linear"));
  }
  const GgufTensor* freqs = FindTensor(contents, kRopeFreqs);
  if (freqs == nullptr) return absl::OkStatus();
  if (out.rope_scaling.kind != RopeScaling::Kind::kNone) {
    return keys.Unsupported("linear RoPE scaling together with rope_freqs.weight");
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> divisors,
                         ReadRopeDivisors(file, *freqs, out.head_dim));
  const std::optional<RopeScaling> scaling =
      Llama3ScalingFromDivisors(divisors, out.head_dim, out.rope_theta);
  if (!scaling.has_value()) {
    return keys.Unsupported("rope_freqs.weight is not by any published Llama 3 scaling");
  }
  out.rope_scaling = *scaling;
  return absl::OkStatus();
}

absl::Status ReadTokenIds(const Keys& keys, ModelConfig& out) {
  const auto read = [&](const std::string& key) -> absl::StatusOr<int32_t> {
    WALSH_ASSIGN_OR_RETURN(const int64_t id, keys.GetOr<int64_t>(key, "an integer", -1));
    if (id >= -1 && id < out.vocab) return static_cast<int32_t>(id);
    return keys.Bad(key, absl::StrCat("is ", id, ", must be below ", out.vocab));
  };
  WALSH_ASSIGN_OR_RETURN(out.bos_token, read("tokenizer.ggml.bos_token_id"));
  // End of turn and end of message end an answer as well as end of text does.
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                          "tokenizer.ggml.eom_token_id"}) {
    WALSH_ASSIGN_OR_RETURN(const int32_t id, read(key));
    if (id >= 0 &&
        std::find(out.eos_tokens.begin(), out.eos_tokens.end(), id) == out.eos_tokens.end()) {
      out.eos_tokens.push_back(id);
    }
  }
  return absl::OkStatus();
}

std::vector<double> Llama3Divisors(const RopeScaling& s, int64_t head_dim, double rope_theta) {
  const auto original = static_cast<double>(s.original_max_position);
  std::vector<double> divisors;
  for (int64_t i = 0; i < head_dim; i += 2) {
    const double frequency =
        std::pow(rope_theta, -static_cast<double>(i) / static_cast<double>(head_dim));
    const double wavelength = 2 * std::numbers::pi / frequency;
    if (wavelength < original / s.high_freq_factor) {
      divisors.push_back(1.0);
    } else if (wavelength > original / s.low_freq_factor) {
      divisors.push_back(s.factor);
    } else {
      const double smooth =
          (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      divisors.push_back(1.0 / ((1.0 - smooth) / s.factor + smooth));
    }
  }
  return divisors;
}

template <typename To, typename From>
absl::StatusOr<std::vector<To>> Narrow(const Keys& keys, const std::string& key,
                                       const std::vector<From>& values) {
  std::vector<To> out;
  out.reserve(values.size());
  for (const From value : values) {
    if constexpr (std::is_integral_v<To>) {
      if (value < std::numeric_limits<To>::min() || value > std::numeric_limits<To>::max()) {
        return keys.Bad(key, absl::StrCat("holds ", value, ", beyond 32 bits"));
      }
    }
    out.push_back(static_cast<To>(value));
  }
  return out;
}

absl::Status CheckLength(const Keys& keys, const std::string& key, size_t length, size_t n_tokens) {
  if (length == n_tokens) return absl::OkStatus();
  return keys.Bad(key, absl::StrCat("has ", length, " items, the vocabulary ", n_tokens));
}

absl::Status ReadTokens(const Keys& keys, GgufVocabulary& out) {
  WALSH_ASSIGN_OR_RETURN(
      out.tokens, keys.Get<std::vector<std::string>>("tokenizer.ggml.tokens", "a list of strings"));
  if (out.tokens.empty() || out.tokens.size() > static_cast<size_t>(limits::kVocabMax)) {
    return keys.Bad(
        "tokenizer.ggml.tokens",
        absl::StrCat("has ", out.tokens.size(), " items, must be 1 to ", limits::kVocabMax));
  }
  const size_t n = out.tokens.size();
  const std::string types = "tokenizer.ggml.token_type";
  if (keys.Has(types)) {
    WALSH_ASSIGN_OR_RETURN(const auto list,
                           keys.Get<std::vector<int64_t>>(types, "a list of integers"));
    WALSH_RETURN_IF_ERROR(CheckLength(keys, types, list.size(), n));
    WALSH_ASSIGN_OR_RETURN(out.types, Narrow<int32_t>(keys, types, list));
  } else {
    out.types.assign(n, 1);
  }
  const std::string scores = "tokenizer.ggml.scores";
  if (out.model == "llama") {
    WALSH_ASSIGN_OR_RETURN(const auto list,
                           keys.Get<std::vector<double>>(scores, "a list of floats"));
    WALSH_RETURN_IF_ERROR(CheckLength(keys, scores, list.size(), n));
    for (const double score : list) {
      if (!std::isfinite(score)) return keys.Bad(scores, "holds a value that is not finite");
    }
    WALSH_ASSIGN_OR_RETURN(out.scores, Narrow<float>(keys, scores, list));
  }
  return absl::OkStatus();
}

absl::Status ReadMerges(const Keys& keys, GgufVocabulary& out) {
  const std::string key = "tokenizer.ggml.merges";
  if (out.model != "gpt2") return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(out.merges, keys.Get<std::vector<std::string>>(key, "a list of strings"));
  for (const std::string& merge : out.merges) {
    // Byte-level tokens never hold a space, so the first one after the first byte separates.
    const size_t space = merge.find(' ', 1);
    if (merge.size() >= 3 && space != std::string::npos && space + 1 < merge.size()) continue;
    return keys.Bad(key, "holds an entry that is not two tokens");
  }
  return absl::OkStatus();
}

absl::Status ReadVocabularyIds(const Keys& keys, GgufVocabulary& out) {
  const auto n = static_cast<int64_t>(out.tokens.size());
  const std::pair<const char*, int32_t*> ids[] = {
      {"tokenizer.ggml.bos_token_id", &out.bos},
      {"tokenizer.ggml.eos_token_id", &out.eos},
      {"tokenizer.ggml.unknown_token_id", &out.unknown}};
  for (const auto& [key, id] : ids) {
    WALSH_ASSIGN_OR_RETURN(const int64_t value, keys.GetOr<int64_t>(key, "an integer", -1));
    if (value < -1 || value >= n) {
      return keys.Bad(key, absl::StrCat("is ", value, ", must be below ", n));
    }
    *id = static_cast<int32_t>(value);
  }
  return absl::OkStatus();
}

// HF's name of an architecture.
std::string HfArchitecture(std::string_view gguf) {
  if (gguf == "qwen2") return "Qwen2ForCausalLM";
  if (gguf == "qwen3") return "Qwen3ForCausalLM";
  if (gguf == "phi3") return "Phi3ForCausalLM";
  if (gguf == "gemma3") return "Gemma3ForCausalLM";
  return "LlamaForCausalLM";
}

absl::Status ReadSlidingWindow(const Keys& keys, ModelConfig& out) {
  const std::string& architecture = keys.architecture();
  if (architecture == "llama") return absl::OkStatus();
  const std::string key = keys.Of("attention.sliding_window");
  WALSH_ASSIGN_OR_RETURN(out.sliding_window, keys.GetOr<int64_t>(key, "an integer", 0));
  if (out.sliding_window < 0) return keys.Bad(key, absl::StrCat("is ", out.sliding_window));
  if (architecture == "gemma3") {
    if (out.sliding_window == 0) return keys.Bad(key, "is missing or 0");
    WALSH_ASSIGN_OR_RETURN(const int64_t pattern,
                           keys.IntegerOr(keys.Of("attention.sliding_window_pattern"),
                                          kGemma3Pattern, limits::kLayersMax));
    out.sliding_layers.assign(static_cast<size_t>(out.n_layers), true);
    for (int64_t i = pattern - 1; i < out.n_layers; i += pattern) {
      out.sliding_layers[static_cast<size_t>(i)] = false;
    }
  } else if (architecture == "phi3" && out.sliding_window > 0) {
    out.sliding_layers.assign(static_cast<size_t>(out.n_layers), true);
  } else if (out.sliding_window > 0 && out.sliding_window < out.max_position) {
    // Which layers is nowhere said.
    return keys.Unsupported(absl::StrCat("sliding-window attention of architecture '", architecture,
                                         "' is not supported in GGUF files ('", key, "' is ",
                                         out.sliding_window, ")"));
  }
  DropIdleWindow(out);
  return absl::OkStatus();
}

absl::Status ReadGemma3(const Keys& keys, ModelConfig& out) {
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping"}) {
    if (keys.Has(keys.Of(key))) {
      return keys.Unsupported(absl::StrCat("key '", keys.Of(key), "' is not supported"));
    }
  }
  WALSH_ASSIGN_OR_RETURN(out.sliding_rope_theta,
                         keys.GetOr<double>(keys.Of("rope.freq_base_swa"), "a float",
                                            double{kGemma3SlidingRopeTheta}));
  out.query_pre_attention_scalar = static_cast<double>(
      out.n_layers == kGemma3LayersOf27B ? out.hidden / out.n_heads : out.head_dim);
  return absl::OkStatus();
}

// Only what HF's configuration could say: a file that has other biases is refused for them.
void ReadBiases(const GgufContents& contents, ModelConfig& out) {
  const bool is_qwen2 = out.architecture == "Qwen2ForCausalLM";
  const bool has_query_bias = FindTensor(contents, "blk.0.attn_q.bias") != nullptr;
  out.attention_bias = is_qwen2 || (has_query_bias && !out.has_fused_linears);
  out.output_bias = out.attention_bias && !is_qwen2;
  out.mlp_bias = out.architecture == "LlamaForCausalLM" &&
                 FindTensor(contents, "blk.0.ffn_up.bias") != nullptr;
}

struct NamePair {
  std::string_view gguf;
  std::string_view hf;
};
constexpr std::array<NamePair, 3> kModelNames = {{{"token_embd.weight", kEmbeddingTensor},
                                                  {"output_norm.weight", kFinalNormTensor},
                                                  {"output.weight", kLmHeadTensor}}};
constexpr std::array<NamePair, 12> kLayerNames = {{{"attn_norm", "input_layernorm"},
                                                   {"ffn_norm", "post_attention_layernorm"},
                                                   {"attn_q", "self_attn.q_proj"},
                                                   {"attn_k", "self_attn.k_proj"},
                                                   {"attn_v", "self_attn.v_proj"},
                                                   {"attn_output", "self_attn.o_proj"},
                                                   {"ffn_gate", "mlp.gate_proj"},
                                                   {"ffn_up", "mlp.up_proj"},
                                                   {"ffn_down", "mlp.down_proj"},
                                                   {"attn_q_norm", "self_attn.q_norm"},
                                                   {"attn_k_norm", "self_attn.k_norm"},
                                                   {"attn_qkv", "self_attn.qkv_proj"}}};
// Names that an architecture uses for something else; they come before those.
constexpr std::array<NamePair, 1> kPhi3Names = {{{"ffn_up", "mlp.gate_up_proj"}}};
constexpr std::array<NamePair, 3> kGemma3Names = {
    {{"ffn_norm", "pre_feedforward_layernorm"},
     {"post_attention_norm", "post_attention_layernorm"},
     {"post_ffw_norm", "post_feedforward_layernorm"}}};

std::string_view HfLayerName(std::string_view gguf, std::string_view architecture) {
  std::span<const NamePair> own;
  if (architecture == "Phi3ForCausalLM") own = kPhi3Names;
  if (architecture == "Gemma3ForCausalLM") own = kGemma3Names;
  for (const std::span<const NamePair> names : {own, std::span<const NamePair>(kLayerNames)}) {
    for (const NamePair& pair : names) {
      if (gguf == pair.gguf) return pair.hf;
    }
  }
  return gguf;
}

}  // namespace

absl::StatusOr<ModelConfig> GgufModelConfig(const RandomAccessFile& file,
                                            const GgufContents& contents) {
  const Keys keys(file.name(), contents);
  WALSH_RETURN_IF_ERROR(CheckArchitecture(file.name(), keys));
  ModelConfig out;
  out.architecture = HfArchitecture(keys.architecture());
  WALSH_RETURN_IF_ERROR(ReadShape(keys, out));
  SetFamilyTraits(out);
  if (keys.architecture() == "gemma3") WALSH_RETURN_IF_ERROR(ReadGemma3(keys, out));
  WALSH_RETURN_IF_ERROR(ReadSlidingWindow(keys, out));
  WALSH_ASSIGN_OR_RETURN(out.rms_norm_eps,
                         keys.Get<double>(keys.Of("attention.layer_norm_rms_epsilon"), "a float"));
  const GgufTensor* embedding = FindTensor(contents, "token_embd.weight");
  if (embedding == nullptr || embedding->dims.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.name(), ": tensor 'token_embd.weight' is missing or not 2-D"));
  }
  out.vocab = embedding->dims[1];
  out.tied_embeddings = FindTensor(contents, "output.weight") == nullptr;
  ReadBiases(contents, out);
  WALSH_RETURN_IF_ERROR(ReadTokenIds(keys, out));
  WALSH_RETURN_IF_ERROR(ValidateModelConfig(out, file.name()));
  // After the check: reading the divisors relies on a sound head width.
  WALSH_RETURN_IF_ERROR(ReadRope(file, contents, keys, out));
  WALSH_RETURN_IF_ERROR(ValidateModelConfig(out, file.name()));
  return out;
}

absl::StatusOr<GgufVocabulary> GgufVocabularyOf(const RandomAccessFile& file,
                                                const GgufContents& contents) {
  const Keys keys(file.name(), contents);
  GgufVocabulary out;
  WALSH_ASSIGN_OR_RETURN(out.model, keys.Get<std::string>("tokenizer.ggml.model", "a string"));
  if (out.model != "gpt2" && out.model != "llama") {
    return keys.Unsupported(absl::StrCat("vocabulary model '", out.model.substr(0, 64),
                                         "' is not supported; supported: gpt2, llama"));
  }
  WALSH_ASSIGN_OR_RETURN(out.pre,
                         keys.GetOr<std::string>("tokenizer.ggml.pre", "a string", std::string()));
  WALSH_RETURN_IF_ERROR(ReadTokens(keys, out));
  WALSH_RETURN_IF_ERROR(ReadMerges(keys, out));
  WALSH_RETURN_IF_ERROR(ReadVocabularyIds(keys, out));
  out.has_add_bos = keys.Has("tokenizer.ggml.add_bos_token");
  WALSH_ASSIGN_OR_RETURN(out.add_bos, keys.GetOr<bool>("tokenizer.ggml.add_bos_token", "a boolean",
                                                       out.model == "llama"));
  WALSH_ASSIGN_OR_RETURN(out.add_eos,
                         keys.GetOr<bool>("tokenizer.ggml.add_eos_token", "a boolean", false));
  WALSH_ASSIGN_OR_RETURN(out.add_space_prefix,
                         keys.GetOr<bool>("tokenizer.ggml.add_space_prefix", "a boolean", true));
  return out;
}

absl::StatusOr<GgufVocabulary> ReadGgufVocabulary(const std::string& path) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<RandomAccessFile> file, OpenRandomAccessFile(path));
  WALSH_ASSIGN_OR_RETURN(const GgufContents contents, ParseGguf(*file));
  return GgufVocabularyOf(*file, contents);
}

std::string GgufStringOrEmpty(const GgufContents& contents, std::string_view key) {
  const auto it = contents.metadata.find(key);
  if (it == contents.metadata.end()) return "";
  const auto* text = std::get_if<std::string>(&it->second);
  return text == nullptr ? "" : *text;
}

std::string HfTensorName(std::string_view gguf_name, std::string_view architecture) {
  for (const NamePair& pair : kModelNames) {
    if (gguf_name == pair.gguf) return std::string(pair.hf);
  }
  constexpr std::string_view kBlock = "blk.";
  if (gguf_name.substr(0, kBlock.size()) != kBlock) return std::string(gguf_name);
  const size_t layer_end = gguf_name.find('.', kBlock.size());
  const size_t kind_begin = gguf_name.rfind('.');  // ".weight", ".bias"
  if (layer_end == std::string_view::npos || kind_begin <= layer_end) {
    return std::string(gguf_name);
  }
  const std::string_view layer = gguf_name.substr(kBlock.size(), layer_end - kBlock.size());
  const std::string_view suffix =
      HfLayerName(gguf_name.substr(layer_end + 1, kind_begin - layer_end - 1), architecture);
  return absl::StrCat("model.layers.", std::string(layer), ".", std::string(suffix),
                      std::string(gguf_name.substr(kind_begin)));
}

std::vector<float> Llama3FrequencyDivisors(const RopeScaling& scaling, int64_t head_dim,
                                           double rope_theta) {
  const std::vector<double> divisors = Llama3Divisors(scaling, head_dim, rope_theta);
  return std::vector<float>(divisors.begin(), divisors.end());
}

absl::StatusOr<std::string> GgufTensorName(std::string_view hf_name) {
  for (const NamePair& pair : kModelNames) {
    if (hf_name == pair.hf) return std::string(pair.gguf);
  }
  constexpr std::string_view kLayers = "model.layers.";
  const size_t layer_end = hf_name.find('.', kLayers.size());
  const size_t kind_begin = hf_name.rfind('.');  // ".weight", ".bias"
  if (hf_name.starts_with(kLayers) && layer_end < kind_begin) {
    const std::string_view layer = hf_name.substr(kLayers.size(), layer_end - kLayers.size());
    const std::string_view suffix = hf_name.substr(layer_end + 1, kind_begin - layer_end - 1);
    for (const NamePair& pair : kLayerNames) {
      if (suffix != pair.hf) continue;
      return absl::StrCat("blk.", std::string(layer), ".", std::string(pair.gguf),
                          std::string(hf_name.substr(kind_begin)));
    }
  }
  return absl::UnimplementedError(
      absl::StrCat("GGUF's architecture 'llama' has no tensor '", std::string(hf_name), "'"));
}

std::optional<RopeScaling> Llama3ScalingFromDivisors(const std::vector<float>& divisors,
                                                     int64_t head_dim, double rope_theta) {
  // Llama 3.1, 3.3 and 4: 8; Llama 3.2: 32. The other parameters never changed.
  for (const double factor : {8.0, 16.0, 32.0}) {
    RopeScaling scaling{.kind = RopeScaling::Kind::kLlama3,
                        .factor = factor,
                        .low_freq_factor = 1.0,
                        .high_freq_factor = 4.0,
                        .original_max_position = 8192,
                        .frequency_divisors = divisors};
    const std::vector<double> expected = Llama3Divisors(scaling, head_dim, rope_theta);
    const bool is_equal = std::equal(
        expected.begin(), expected.end(), divisors.begin(), divisors.end(),
        [](double a, float b) { return std::abs(a - static_cast<double>(b)) <= 1e-4 * a; });
    if (is_equal) return scaling;
  }
  return std::nullopt;
}

}  // namespace walsh
