// The vocabulary inside a GGUF file (keys tokenizer.ggml.*), as stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace walsh {

struct GgufVocabulary {
  std::string model;  // "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE)
  std::string pre;    // pre-tokenizer: "llama-bpe", "gpt-2", "qwen2", "smollm", …; may be empty
  std::vector<std::string> tokens;
  std::vector<float> scores;   // [tokens] for "llama", else empty
  std::vector<int32_t> types;  // [tokens]: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte
  std::vector<std::string> merges;  // "left right" for "gpt2"
  int32_t bos = -1;
  int32_t eos = -1;
  int32_t unknown = -1;
  bool add_bos = false;
  bool has_add_bos = false;  // the key was there
  bool add_eos = false;
  bool add_space_prefix = true;
};

}  // namespace walsh
