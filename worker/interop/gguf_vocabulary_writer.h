// The vocabulary of a tokenizer.json as a GGUF file stores it: the inverse of
// worker/io/tokenizer_json_writer.h.
//
// Byte-level BPE becomes model "gpt2" with its merges and the name of its pre-tokenizer; BPE with
// byte fallback becomes model "llama", whose readers merge by scores: a token's score is the rank
// of its first merge, negated.
//
// Errors:  INVALID_ARGUMENT  malformed (member named)
//          UNIMPLEMENTED     a tokenizer that GGUF has no name for: its type, normalizer,
//                            pre-tokenizer or post-processor is named
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gguf_vocabulary.h"
#include "worker/io/gguf_writer.h"

namespace walsh::interop {

struct WrittenVocabulary {
  GgufVocabulary vocabulary;
  std::vector<std::string> warnings;
};

// `config` gives BOS, EOS and the number of embedding rows; ids without a token are filled up with
// unused ones.
absl::StatusOr<WrittenVocabulary> MakeGgufVocabulary(const TokenizerSource& source,
                                                     const ModelConfig& config);

// The keys tokenizer.ggml.*, as llama.cpp's converter writes them. The model's further end tokens
// stand as end of turn and of message.
void AddVocabulary(const GgufVocabulary& vocabulary, const ModelConfig& config,
                   const std::string& chat_template, GgufMetadata& metadata);

}  // namespace walsh::interop
