#include "tests/testing/tiny_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/check.h"
#include "common/utf8.h"
#include "tests/testing/checkpoint_bytes.h"
#include "worker/tensor/half.h"

namespace walsh::testing {
namespace {

using nlohmann::json;

constexpr char kBos[] = "<|begin|>";
constexpr char kEos[] = "<|end|>";

// Common English pairs; a merge may use the result of an earlier one. "Ġ" is the byte-level space.
constexpr const char* kMerges[] = {
    "t h", "h e", "i n", "e r", "a n", "r e", "o n",  "a t",  "e n",  "n d",   "t i",  "e s",
    "o r", "t e", "o f", "e d", "i s", "i t", "a l",  "a r",  "s t",  "t o",   "n t",  "n g",
    "s e", "h a", "a s", "o u", "i o", "l e", "v e",  "c o",  "m e",  "d e",   "h i",  "r i",
    "r o", "i c", "n e", "e a", "r a", "c e", "l i",  "c h",  "Ġ a",  "Ġ t",   "Ġ s",  "Ġ w",
    "Ġ c", "Ġ b", "Ġ p", "Ġ m", "Ġ f", "Ġ d", "th e", "in g", "an d", "Ġ the", "Ġ of", "Ġ to"};

// SplitMix64: the same stream on every machine, unlike the standard distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [−1, 1).
  float Symmetric() {
    return static_cast<float>(static_cast<double>(Next() >> 11) * 0x1p-52 - 1.0);
  }

 private:
  uint64_t state_;
};

float RoundTo(float value, const std::string& dtype) {
  if (dtype == "F16") return HalfToFloat(FloatToHalf(value));
  if (dtype == "BF16") return Bf16ToFloat(FloatToBf16(value));
  return value;
}

struct Layout {
  std::string name;
  std::vector<int64_t> shape;
};

bool IsGemma3(const TinyModelOptions& o) { return o.architecture == "Gemma3ForCausalLM"; }
bool IsPhi3(const TinyModelOptions& o) { return o.architecture == "Phi3ForCausalLM"; }
bool IsQwen2(const TinyModelOptions& o) { return o.architecture == "Qwen2ForCausalLM"; }
bool HasQkNorm(const TinyModelOptions& o) {
  return IsGemma3(o) || o.architecture == "Qwen3ForCausalLM";
}

std::vector<Layout> Layouts(const TinyModelOptions& o) {
  const int64_t q_width = o.n_heads * o.head_dim;
  const int64_t kv_width = o.n_kv_heads * o.head_dim;
  std::vector<Layout> out = {{"model.embed_tokens.weight", {o.vocab, o.hidden}}};
  for (int64_t layer = 0; layer < o.n_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const auto linear = [&](const std::string& name, int64_t rows, int64_t cols, bool has_bias) {
      out.push_back({prefix + name + ".weight", {rows, cols}});
      if (has_bias) out.push_back({prefix + name + ".bias", {rows}});
    };
    const auto norm = [&](const std::string& name, int64_t size) {
      out.push_back({prefix + name + ".weight", {size}});
    };
    norm("input_layernorm", o.hidden);
    if (IsPhi3(o)) {
      linear("self_attn.qkv_proj", q_width + 2 * kv_width, o.hidden, false);
    } else {
      const bool has_bias = o.has_attention_bias || IsQwen2(o);
      linear("self_attn.q_proj", q_width, o.hidden, has_bias);
      linear("self_attn.k_proj", kv_width, o.hidden, has_bias);
      linear("self_attn.v_proj", kv_width, o.hidden, has_bias);
    }
    linear("self_attn.o_proj", o.hidden, q_width, o.has_attention_bias);
    if (HasQkNorm(o)) {
      norm("self_attn.q_norm", o.head_dim);
      norm("self_attn.k_norm", o.head_dim);
    }
    norm("post_attention_layernorm", o.hidden);
    if (IsGemma3(o)) {
      norm("pre_feedforward_layernorm", o.hidden);
      norm("post_feedforward_layernorm", o.hidden);
    }
    if (IsPhi3(o)) {
      linear("mlp.gate_up_proj", 2 * o.intermediate, o.hidden, false);
    } else {
      linear("mlp.gate_proj", o.intermediate, o.hidden, o.has_mlp_bias);
      linear("mlp.up_proj", o.intermediate, o.hidden, o.has_mlp_bias);
    }
    linear("mlp.down_proj", o.hidden, o.intermediate, o.has_mlp_bias);
  }
  out.push_back({"model.norm.weight", {o.hidden}});
  if (!o.is_tied) out.push_back({"lm_head.weight", {o.vocab, o.hidden}});
  return out;
}

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t dim : shape) product *= dim;
  return product;
}

bool IsNorm(const std::string& name) { return name.find("norm.weight") != std::string::npos; }

std::vector<float> Values(const Layout& layout, const TinyModelOptions& o, Random& random) {
  std::vector<float> values(static_cast<size_t>(Product(layout.shape)));
  // √3: a uniform variable on [−1, 1) has variance 1/3.
  const float scale =
      layout.shape.size() == 1 ? 0.1f : std::sqrt(3.0f / static_cast<float>(layout.shape[1]));
  // Gemma's files hold norms less 1.
  const float offset = IsNorm(layout.name) && !IsGemma3(o) ? 1.0f : 0.0f;
  for (float& value : values) value = RoundTo(offset + scale * random.Symmetric(), o.dtype);
  return values;
}

// The character that stands for a byte in byte-level BPE (GPT-2's bytes_to_unicode).
std::string ByteSymbol(int byte) {
  const auto is_kept = [](int b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
  };
  uint32_t code_point = static_cast<uint32_t>(byte);
  if (!is_kept(byte)) {
    code_point = 256;
    for (int b = 0; b < byte; ++b) code_point += is_kept(b) ? 0 : 1;
  }
  std::string symbol;
  AppendUtf8(code_point, symbol);
  return symbol;
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<std::string> merges;
  int64_t first_special = 0;  // BOS, then EOS, then reserved ones
};

Vocabulary MakeVocabulary(int64_t vocab) {
  WALSH_CHECK_GE(vocab, 258);
  Vocabulary out;
  for (int byte = 0; byte < 256; ++byte) out.tokens.push_back(ByteSymbol(byte));
  for (const char* merge : kMerges) {
    if (static_cast<int64_t>(out.tokens.size()) + 2 == vocab) break;
    std::string token = merge;
    token.erase(token.find(' '), 1);
    out.tokens.push_back(token);
    out.merges.emplace_back(merge);
  }
  out.first_special = static_cast<int64_t>(out.tokens.size());
  out.tokens.emplace_back(kBos);
  out.tokens.emplace_back(kEos);
  for (int i = 0; static_cast<int64_t>(out.tokens.size()) < vocab; ++i) {
    out.tokens.push_back("<|reserved_" + std::to_string(i) + "|>");
  }
  return out;
}

json AddedToken(const std::string& content, int64_t id) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

// Header and data of one safetensors file.
struct Weights {
  json header = json::object();
  std::string data;

  void Add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           const std::string& bytes) {
    header[name] = {{"dtype", dtype},
                    {"shape", shape},
                    {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data += bytes;
  }
  std::string Bytes() const { return SafetensorsBytes(header.dump(), data); }
};

// Damage that concerns one tensor; everything else is written whole.
void AddDamaged(const TinyTensor& tensor, const std::string& dtype, Damage damage,
                Weights& weights) {
  std::vector<float> values = tensor.values;
  if (damage == Damage::kNan) values[values.size() / 2] = std::numeric_limits<float>::quiet_NaN();
  const std::string bytes = FloatBytes(values, dtype);
  switch (damage) {
    case Damage::kMissingTensor:
      return;
    case Damage::kWrongDtype:
      return weights.Add(tensor.name, "I32", tensor.shape, FloatBytes(values, "F32"));
    case Damage::kWrongShape:
      return weights.Add(tensor.name, dtype, {tensor.shape[1], tensor.shape[0]}, bytes);
    case Damage::kGap:
      weights.data += std::string(4, '\0');
      return weights.Add(tensor.name, dtype, tensor.shape, bytes);
    case Damage::kOverlap:
      weights.data.resize(weights.data.size() - 4);
      return weights.Add(tensor.name, dtype, tensor.shape, bytes);
    default:
      return weights.Add(tensor.name, dtype, tensor.shape, bytes);
  }
}

void SpoilFile(const std::string& path, Damage damage) {
  const auto size = std::filesystem::file_size(path);
  if (damage == Damage::kTruncated) std::filesystem::resize_file(path, size - 100);
  if (damage == Damage::kTrailingBytes) std::filesystem::resize_file(path, size + 8);
  if (damage == Damage::kHugeHeader) {
    WriteFile(path, Raw(uint64_t{1} << 63) + "{}");
  }
}

// llama.cpp's permutation: within each head, HF's row j·(d/2) + i becomes row 2·i + j.
std::vector<float> PermuteForInterleavedRope(const TinyTensor& tensor, int64_t n_heads) {
  const int64_t rows = tensor.shape[0];
  const int64_t cols = Product(tensor.shape) / rows;
  const int64_t head_dim = rows / n_heads;
  const int64_t half = head_dim / 2;
  std::vector<float> out(tensor.values.size());
  for (int64_t head = 0; head < n_heads; ++head) {
    for (int64_t i = 0; i < half; ++i) {
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t from = head * head_dim + j * half + i;
        const int64_t to = head * head_dim + 2 * i + j;
        std::copy_n(tensor.values.begin() + from * cols, cols, out.begin() + to * cols);
      }
    }
  }
  return out;
}

std::string GgufName(const std::string& hf, const TinyModelOptions& o) {
  std::vector<std::pair<const char*, const char*>> names;
  if (IsGemma3(o)) {
    names = {{"post_attention_layernorm", "post_attention_norm"},
             {"pre_feedforward_layernorm", "ffn_norm"},
             {"post_feedforward_layernorm", "post_ffw_norm"}};
  }
  constexpr std::pair<const char*, const char*> kNames[] = {
      {"model.embed_tokens", "token_embd"},
      {"model.norm", "output_norm"},
      {"lm_head", "output"},
      {"model.layers", "blk"},
      {"input_layernorm", "attn_norm"},
      {"post_attention_layernorm", "ffn_norm"},
      {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},
      {"self_attn.qkv_proj", "attn_qkv"},
      {"self_attn.o_proj", "attn_output"},
      {"self_attn.q_norm", "attn_q_norm"},
      {"self_attn.k_norm", "attn_k_norm"},
      {"mlp.gate_proj", "ffn_gate"},
      {"mlp.up_proj", "ffn_up"},
      {"mlp.gate_up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  names.insert(names.end(), std::begin(kNames), std::end(kNames));
  std::string name = hf;
  for (const auto& [from, to] : names) {
    if (const size_t at = name.find(from); at != std::string::npos) {
      name.replace(at, std::strlen(from), to);
    }
  }
  return name;
}

const char* GgufArchitecture(const TinyModelOptions& o) {
  if (IsGemma3(o)) return "gemma3";
  if (IsPhi3(o)) return "phi3";
  if (IsQwen2(o)) return "qwen2";
  return HasQkNorm(o) ? "qwen3" : "llama";
}

const char* ModelType(const TinyModelOptions& o) {
  if (o.architecture == "MistralForCausalLM") return "mistral";
  return IsGemma3(o) ? "gemma3_text" : GgufArchitecture(o);
}

uint32_t GgmlType(const std::string& dtype) {
  if (dtype == "F16") return 1;
  if (dtype == "BF16") return 30;
  return 0;
}

}  // namespace

TinyModel::TinyModel(TinyModelOptions options) : options_(std::move(options)) {
  Random random(options_.seed);
  for (Layout& layout : Layouts(options_)) {
    std::vector<float> values = Values(layout, options_, random);
    tensors_.push_back({std::move(layout.name), std::move(layout.shape), std::move(values)});
  }
}

const TinyTensor& TinyModel::tensor(const std::string& name) const {
  const auto it = std::find_if(tensors_.begin(), tensors_.end(),
                               [&](const TinyTensor& t) { return t.name == name; });
  WALSH_CHECK(it != tensors_.end());
  return *it;
}

std::string TinyModel::ConfigJson() const {
  const TinyModelOptions& o = options_;
  const int64_t bos = MakeVocabulary(o.vocab).first_special;
  json config = {{"architectures", {o.architecture}},
                 {"model_type", ModelType(o)},
                 {"hidden_size", o.hidden},
                 {"intermediate_size", o.intermediate},
                 {"num_hidden_layers", o.n_layers},
                 {"num_attention_heads", o.n_heads},
                 {"num_key_value_heads", o.n_kv_heads},
                 {"head_dim", o.head_dim},
                 {"vocab_size", o.vocab},
                 {"max_position_embeddings", o.max_position},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", o.rope_theta},
                 {"tie_word_embeddings", o.is_tied},
                 {"attention_bias", o.has_attention_bias},
                 {"mlp_bias", o.has_mlp_bias},
                 {"bos_token_id", bos},
                 {"eos_token_id", bos + 1},
                 {"torch_dtype", o.dtype == "F32" ? "float32" : "bfloat16"}};
  if (IsGemma3(o)) {
    config.erase("hidden_act");
    config["hidden_activation"] = "gelu_pytorch_tanh";
    config["query_pre_attn_scalar"] = o.head_dim;
    config["rope_local_base_freq"] = 10000.0;
    config["sliding_window"] = o.sliding_window > 0 ? o.sliding_window : o.max_position;
  } else if (o.architecture == "MistralForCausalLM" || IsPhi3(o)) {
    config["sliding_window"] = o.sliding_window > 0 ? json(o.sliding_window) : json();
  }
  const json overrides = json::parse(o.config_overrides);
  for (const auto& [key, value] : overrides.items()) {
    if (value.is_null()) {
      config.erase(key);
    } else {
      config[key] = value;
    }
  }
  return config.dump(2);
}

std::string TinyModel::TokenizerJson() const {
  const Vocabulary vocabulary = MakeVocabulary(options_.vocab);
  json vocab = json::object();
  for (int64_t id = 0; id < vocabulary.first_special; ++id) {
    vocab[vocabulary.tokens[static_cast<size_t>(id)]] = id;
  }
  json added = json::array();
  for (int64_t id = vocabulary.first_special; id < options_.vocab; ++id) {
    added.push_back(AddedToken(vocabulary.tokens[static_cast<size_t>(id)], id));
  }
  const json bos_piece = {{"SpecialToken", {{"id", kBos}, {"type_id", 0}}}};
  const json text_piece = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json second_piece = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const json tokenizer = {{"version", "1.0"},
                          {"truncation", nullptr},
                          {"padding", nullptr},
                          {"added_tokens", added},
                          {"normalizer", nullptr},
                          {"pre_tokenizer", byte_level},
                          {"post_processor",
                           {{"type", "TemplateProcessing"},
                            {"single", {bos_piece, text_piece}},
                            {"pair", {bos_piece, text_piece, second_piece}},
                            {"special_tokens",
                             {{kBos,
                               {{"id", kBos},
                                {"ids", {vocabulary.first_special}},
                                {"tokens", json::array({kBos})}}}}}}},
                          {"decoder", byte_level},
                          {"model",
                           {{"type", "BPE"},
                            {"dropout", nullptr},
                            {"unk_token", nullptr},
                            {"continuing_subword_prefix", nullptr},
                            {"end_of_word_suffix", nullptr},
                            {"fuse_unk", false},
                            {"byte_fallback", false},
                            {"ignore_merges", false},
                            {"vocab", vocab},
                            {"merges", vocabulary.merges}}}};
  return tokenizer.dump();
}

std::string TinyModel::TokenizerConfigJson() const {
  const json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", kBos},
                       {"eos_token", kEos},
                       {"add_bos_token", true},
                       {"model_max_length", options_.max_position},
                       {"chat_template",
                        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
                        "{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt "
                        "%}assistant:{% endif %}"}};
  return config.dump(2);
}

void TinyModel::WriteHf(const std::string& directory, Damage damage) const {
  std::filesystem::create_directories(directory);
  if (damage != Damage::kNoConfig) {
    json config = json::parse(ConfigJson());
    if (damage == Damage::kUnknownArchitecture) config["architectures"] = {"GPT2LMHeadModel"};
    WriteFile(directory + "/config.json", config.dump(2));
  }
  if (damage != Damage::kNoTokenizer) {
    WriteFile(directory + "/tokenizer.json", TokenizerJson());
    WriteFile(directory + "/tokenizer_config.json", TokenizerConfigJson());
  }
  if (damage == Damage::kNoWeights) return;

  const int n_shards = options_.n_shards;
  std::vector<Weights> shards(static_cast<size_t>(n_shards));
  const auto name_of = [&](int shard) {
    if (n_shards == 1) return std::string("model.safetensors");
    char name[64];
    std::snprintf(name, sizeof(name), "model-%05d-of-%05d.safetensors", shard + 1, n_shards);
    return std::string(name);
  };
  json weight_map = json::object();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const auto shard = static_cast<int>(i * static_cast<size_t>(n_shards) / tensors_.size());
    const TinyTensor& tensor = tensors_[i];
    weight_map[tensor.name] = name_of(shard);
    AddDamaged(tensor, options_.dtype, tensor.name == kDamagedTensor ? damage : Damage::kNone,
               shards[static_cast<size_t>(shard)]);
  }
  for (int shard = 0; shard < n_shards; ++shard) {
    WriteFile(directory + "/" + name_of(shard), shards[static_cast<size_t>(shard)].Bytes());
  }
  if (n_shards > 1) {
    WriteFile(directory + "/model.safetensors.index.json",
              json({{"metadata", json::object()}, {"weight_map", weight_map}}).dump(2));
  }
  SpoilFile(directory + "/" + name_of(n_shards - 1), damage);
}

namespace {

// As llama.cpp's converter does: its formula for rope_freqs.weight, written out again.
void AddRopeScaling(const TinyModelOptions& o, GgufBuilder& gguf) {
  const json scaling = json::parse(o.config_overrides).value("rope_scaling", json::object());
  const std::string kind = scaling.value("rope_type", "default");
  if (kind == "linear") {
    gguf.String(GgufArchitecture(o) + std::string(".rope.scaling.type"), "linear")
        .Float32(GgufArchitecture(o) + std::string(".rope.scaling.factor"),
                 scaling["factor"].get<float>());
  } else if (kind == "llama3") {
    const double factor = scaling["factor"];
    const double low = scaling["low_freq_factor"];
    const double high = scaling["high_freq_factor"];
    const double context = scaling["original_max_position_embeddings"];
    std::vector<float> divisors;
    for (int64_t i = 0; i < o.head_dim; i += 2) {
      const double wavelength =
          2 * M_PI *
          std::pow(o.rope_theta, static_cast<double>(i) / static_cast<double>(o.head_dim));
      const double smooth = (context / wavelength - low) / (high - low);
      divisors.push_back(static_cast<float>(wavelength < context / high ? 1.0
                                            : wavelength > context / low
                                                ? factor
                                                : 1 / ((1 - smooth) / factor + smooth)));
    }
    gguf.Tensor("rope_freqs.weight", {divisors.size()}, GgmlType("F32"),
                FloatBytes(divisors, "F32"));
  } else {
    WALSH_CHECK(kind == "default");
  }
}

}  // namespace

void TinyModel::WriteGguf(const std::string& path) const {
  const TinyModelOptions& o = options_;
  const Vocabulary vocabulary = MakeVocabulary(o.vocab);
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  std::vector<int32_t> types(vocabulary.tokens.size(), 1);
  std::fill(types.begin() + vocabulary.first_special, types.end(), 3);
  GgufBuilder gguf;
  const std::string architecture = GgufArchitecture(o);
  const auto key = [&](const char* name) { return architecture + "." + name; };
  gguf.String("general.architecture", architecture)
      .String("general.name", "tiny")
      .String("general.license", "apache-2.0")
      .Uint32(key("block_count"), u32(o.n_layers))
      .Uint32(key("context_length"), u32(o.max_position))
      .Uint32(key("embedding_length"), u32(o.hidden))
      .Uint32(key("feed_forward_length"), u32(o.intermediate))
      .Uint32(key("attention.head_count"), u32(o.n_heads))
      .Uint32(key("attention.head_count_kv"), u32(o.n_kv_heads))
      .Uint32(key("attention.key_length"), u32(o.head_dim))
      .Uint32(key("attention.value_length"), u32(o.head_dim))
      .Uint32(key("rope.dimension_count"), u32(o.head_dim))
      .Float32(key("rope.freq_base"), static_cast<float>(o.rope_theta))
      .Float32(key("attention.layer_norm_rms_epsilon"), 1e-5f)
      .Uint32(key("vocab_size"), u32(o.vocab))
      .String("tokenizer.ggml.model", "gpt2")
      .String("tokenizer.ggml.pre", "gpt-2")
      .Strings("tokenizer.ggml.tokens", vocabulary.tokens)
      .Ints("tokenizer.ggml.token_type", types)
      .Strings("tokenizer.ggml.merges", vocabulary.merges)
      .Uint32("tokenizer.ggml.bos_token_id", u32(vocabulary.first_special))
      .Uint32("tokenizer.ggml.eos_token_id", u32(vocabulary.first_special + 1))
      .Bool("tokenizer.ggml.add_bos_token", true);
  if (IsGemma3(o) || (IsPhi3(o) && o.sliding_window > 0)) {
    gguf.Uint32(key("attention.sliding_window"),
                u32(o.sliding_window > 0 ? o.sliding_window : o.max_position));
  }
  AddRopeScaling(o, gguf);
  for (const TinyTensor& tensor : tensors_) {
    const std::string name = GgufName(tensor.name, o);
    TinyTensor stored = tensor;
    if (architecture != "llama") {
      // Rows are as in HF's files, and norms hold what they leave out.
      const bool is_offset = IsGemma3(o) && IsNorm(tensor.name);
      for (float& value : stored.values) value += is_offset ? 1.0f : 0.0f;
    } else if (name.find("attn_q.") != std::string::npos) {
      stored.values = PermuteForInterleavedRope(tensor, o.n_heads);
    } else if (name.find("attn_k.") != std::string::npos) {
      stored.values = PermuteForInterleavedRope(tensor, o.n_kv_heads);
    }
    const std::string dtype = tensor.shape.size() == 1 ? "F32" : o.dtype;
    const std::vector<uint64_t> dims(tensor.shape.rbegin(), tensor.shape.rend());
    gguf.Tensor(name, dims, GgmlType(dtype), FloatBytes(stored.values, dtype));
  }
  WriteFile(path, gguf.Build());
}

}  // namespace walsh::testing
