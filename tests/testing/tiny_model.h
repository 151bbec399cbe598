// Small seeded models on disk, of Llama's or another family, as a HF directory and as a GGUF file,
// whole or damaged.
//
//   const TinyModel model({.seed = 7, .is_tied = true});
//   model.WriteHf(dir / "tiny");              // config.json, model.safetensors, tokenizer files
//   model.WriteGguf(dir / "tiny.gguf");       // the same weights; Q and K rows permuted
//
// Weights are uniform with variance 1/in, norms near 1; the same options give the same bytes on
// every machine. The tokenizer is a byte-level BPE (GPT-2's pattern) of 256 bytes, up to 60 merges,
// BOS and EOS, filled up to the vocabulary with reserved special tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace walsh::testing {

struct TinyModelOptions {
  uint64_t seed = 1;
  int64_t hidden = 64;
  int64_t intermediate = 128;
  int64_t n_layers = 2;
  int64_t n_heads = 4;
  int64_t n_kv_heads = 2;
  int64_t head_dim = 16;
  int64_t vocab = 320;  // at least 258
  int64_t max_position = 256;
  bool is_tied = false;
  bool has_attention_bias = false;
  bool has_mlp_bias = false;
  double rope_theta = 10000.0;
  // One of common/architectures.h. Biases of Qwen2, norms of Qwen3 and Gemma3 and the fused linears
  // of Phi3 follow from it; their window is `sliding_window`. In GGUF, Mistral is "llama".
  std::string architecture = "LlamaForCausalLM";
  int64_t sliding_window = 0;  // 0: none, and the context for Gemma3
  // F32, F16 or BF16: how weights are stored in both formats. Norms in GGUF are always F32.
  std::string dtype = "F32";
  // HF: 1 writes model.safetensors, more write shards and an index.
  int n_shards = 1;
  // Members to set in config.json, as a JSON object: {"rope_scaling": {…}}. null removes a member.
  // WriteGguf follows rope_scaling (linear and llama3) and no other member.
  std::string config_overrides = "{}";
};

// What WriteHf spoils, for tests of bad input.
enum class Damage {
  kNone,
  kTruncated,            // the last 100 bytes of the last weights file are missing
  kTrailingBytes,        // 8 bytes after the last tensor
  kGap,                  // 4 bytes between two tensors
  kOverlap,              // two tensors share 4 bytes
  kHugeHeader,           // header length 2^63
  kWrongDtype,           // one linear's weight is stored as I32
  kMissingTensor,        // one linear's weight is not there
  kWrongShape,           // one linear's weight has its dimensions swapped
  kNan,                  // one element of one linear is NaN
  kUnknownArchitecture,  // "GPT2LMHeadModel"
  kNoConfig,
  kNoTokenizer,
  kNoWeights,
};
// The tensor that kWrongDtype, kMissingTensor, kWrongShape and kNan concern.
inline constexpr char kDamagedTensor[] = "model.layers.1.mlp.up_proj.weight";

struct TinyTensor {
  std::string name;  // as HF's files have it
  std::vector<int64_t> shape;
  std::vector<float> values;  // as read back: rounded to the stored dtype
};

class TinyModel {
 public:
  explicit TinyModel(TinyModelOptions options);

  const TinyModelOptions& options() const { return options_; }
  const std::vector<TinyTensor>& tensors() const { return tensors_; }
  const TinyTensor& tensor(const std::string& name) const;

  std::string ConfigJson() const;
  std::string TokenizerJson() const;
  std::string TokenizerConfigJson() const;

  // Creates `directory` where it does not exist.
  void WriteHf(const std::string& directory, Damage damage = Damage::kNone) const;
  void WriteGguf(const std::string& path) const;

 private:
  TinyModelOptions options_;
  std::vector<TinyTensor> tensors_;
};

}  // namespace walsh::testing
