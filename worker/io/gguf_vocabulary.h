// The vocabulary inside a GGUF file (keys tokenizer.ggml.*), as stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

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

// The vocabulary of a GGUF file, with or without a model in it.
//
// Errors: NOT_FOUND no such file; INVALID_ARGUMENT and DATA_LOSS malformed (the message names file
//         and key); UNIMPLEMENTED a vocabulary model other than the two above
absl::StatusOr<GgufVocabulary> ReadGgufVocabulary(const std::string& path);

}  // namespace walsh
