// A SentencePiece vocabulary of the BPE kind, whatever file it came from, made into a tokenizer.
//
// Source:  Kudo and Richardson 2018 (arXiv 1808.06226); the reference implementation's rules for
//          user-defined pieces, the dummy prefix, byte fallback and runs of unknown characters.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/tokenizer/bpe_tokenizer.h"

namespace walsh {

// Numbers as in sentencepiece_model.proto.
enum class PieceType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

struct SentencePieceVocabulary {
  std::vector<std::string> pieces;  // "▁" for a space
  std::vector<float> scores;        // [pieces]; the highest merges first
  std::vector<int32_t> types;       // [pieces], of PieceType
  int32_t unknown = -1;
  // A space before the text, so that words are the same at its start.
  bool adds_dummy_prefix = true;
  // User-defined pieces are looked for before the text is normalized, so that what follows one
  // begins like a text of its own: llama.cpp's way. SentencePiece looks for them afterwards.
  bool finds_user_defined_in_raw_text = false;
};

// BOS, EOS and the rule for them are left to the caller.
//
// Errors:  INVALID_ARGUMENT  sizes that differ, unknown types, two unknown pieces
absl::StatusOr<BpeTokenizerParts> MakeSentencePieceParts(const SentencePieceVocabulary& source);

}  // namespace walsh
