// Reads a model and a tokenizer of llama2.c (version 0 of its format), for the golden test only.
//
// Source: github.com/karpathy/llama2.c, run.c: 7 int32 (dim, hidden_dim, n_layers, n_heads,
//         n_kv_heads, vocab, seq_len), then float32 weights by kind, each for all layers.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/unit/worker/model/dense_model.h"

namespace walsh::testing {

// Its interleaved RoPE pairs (2i, 2i + 1) become ours (i, i + head_dim/2): rows of Q and K are
// reordered.
absl::StatusOr<DenseModel> ReadLlama2cModel(const std::string& path);

class Llama2cTokenizer {
 public:
  static absl::StatusOr<Llama2cTokenizer> Read(const std::string& path, int64_t vocab);
  // BOS, a space, and the text, merged greedily by score.
  std::vector<int32_t> Encode(const std::string& text) const;

 private:
  int32_t Find(const std::string& piece) const;  // −1: not there
  std::vector<std::string> pieces_;
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<float> scores_;
};

}  // namespace walsh::testing
