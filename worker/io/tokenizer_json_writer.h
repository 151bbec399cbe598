// HF tokenizer files from the vocabulary of a GGUF file, for artifacts made from one.
//
// Byte-level vocabularies ("gpt2") keep their merges; SentencePiece ones ("llama") get merges
// derived from the scores as HF's converter derives them. What comes out encodes as the source does
// (checked with the Python packages tokenizers and sentencepiece, see tests/golden/io).
//
// Source:  transformers' convert_slow_tokenizer.py (generate_merges, LlamaConverter), and the
//          tokenizer.json of Llama 3, Qwen 2, SmolLM 2 and GPT-2
// Errors:  UNIMPLEMENTED     a pre-tokenizer that walsh does not know, by name
//          INVALID_ARGUMENT  a token that appears twice; a BOS or EOS to be added that is missing
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "worker/io/gguf_vocabulary.h"

namespace walsh {

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
};

// `chat_template` may be empty; `max_position` is the model's context in tokens.
absl::StatusOr<TokenizerFiles> MakeTokenizerFiles(const GgufVocabulary& vocabulary,
                                                  const std::string& chat_template,
                                                  int64_t max_position);

}  // namespace walsh
