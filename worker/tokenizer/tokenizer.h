// Text to token ids and back.
//
// One implementation of byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and one of
// SentencePiece-style BPE (Llama 1/2, Mistral, TinyStories), built from tokenizer.json, a
// SentencePiece .model or a GGUF vocabulary. Encoding takes time linear in the bytes (up to a
// logarithm).
//
// Errors:  INVALID_ARGUMENT    malformed source, with the field; text to encode that is not UTF-8
//          UNIMPLEMENTED       a pre-tokenizer, normalizer or model that walsh does not know, by
//                              name
//          RESOURCE_EXHAUSTED  text that a hostile source's rules make too long
// Threads: const methods are safe from several threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"

namespace walsh {

class Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const TokenizerSource& source);
  virtual ~Tokenizer() = default;

  struct EncodeOptions {
    // Applies the source's own rule for BOS (and EOS, where it has one).
    bool add_special_tokens = true;
    // Special tokens spelled out in the text ("<|eot_id|>") become their ids, as a rendered chat
    // template needs it.
    bool parse_special_tokens = true;
  };
  virtual absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                                      const EncodeOptions& options) const = 0;

  // The exact bytes that a token stands for in the middle of a text; may be part of a code point.
  // Empty for special tokens when `skip_special` and for ids outside the vocabulary.
  virtual std::string TokenBytes(int32_t id, bool skip_special) const = 0;
  // Whole sequences, with the rule for a leading space; invalid UTF-8 becomes U+FFFD.
  virtual std::string Decode(std::span<const int32_t> ids, bool skip_special) const = 0;
  // True when Decode drops one leading space of the first text token (SentencePiece-style BPE).
  virtual bool strips_leading_space() const = 0;

  virtual int32_t vocab_size() const = 0;
  virtual int32_t bos() const = 0;  // −1: none
  virtual int32_t eos() const = 0;  // −1: none
  virtual bool IsSpecial(int32_t id) const = 0;
  // Id of a token by its literal spelling; −1 when there is none.
  virtual int32_t TokenId(std::string_view token) const = 0;
};

}  // namespace walsh
