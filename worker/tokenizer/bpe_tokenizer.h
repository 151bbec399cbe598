// The tokenizer itself: added tokens, normalizer, pre-tokenizer, merges, and the way back.
//
// What the sources (tokenizer.json, SentencePiece, GGUF) have in common; each of their readers
// fills BpeTokenizerParts and is done.
//
// Threads: const methods are safe from several threads.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/tokenizer/added_tokens.h"
#include "worker/tokenizer/bpe_model.h"
#include "worker/tokenizer/normalizer.h"
#include "worker/tokenizer/pre_tokenizer.h"
#include "worker/tokenizer/tokenizer.h"
#include "worker/tokenizer/vocabulary.h"

namespace walsh {

struct BpeTokenizerParts {
  std::unique_ptr<Vocabulary> vocabulary;  // the model's and the added tokens
  std::unique_ptr<BpeModel> model;         // refers to the vocabulary
  AddedTokens raw_added;                   // searched in the text as it came
  AddedTokens normalized_added;            // searched after the normalizer
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;

  // By id.
  std::vector<bool> is_special;
  std::vector<bool> is_added;
  // What added tokens stand for where it is not their spelling: they were normalized.
  absl::flat_hash_map<int32_t, std::string> normalized_spellings;

  // Spellings are in GPT-2's byte alphabet; else "▁" is a space and <0x0A> a byte.
  bool is_byte_level = false;
  bool has_byte_fallback = false;
  bool strips_leading_space = false;

  std::vector<int32_t> prefix;  // BOS, by the source's rule
  std::vector<int32_t> suffix;  // EOS, by the source's rule
  int32_t bos = -1;
  int32_t eos = -1;
};

std::unique_ptr<Tokenizer> MakeBpeTokenizer(BpeTokenizerParts parts);

// The three sources. Errors as in tokenizer.h.
absl::StatusOr<BpeTokenizerParts> ReadTokenizerJson(const TokenizerSource& source);
absl::StatusOr<BpeTokenizerParts> ReadSentencePieceModel(const TokenizerSource& source);
absl::StatusOr<BpeTokenizerParts> ReadGgufTokenizer(const GgufVocabulary& gguf);

}  // namespace walsh
