// From a piece of text (what a pre-tokenizer made) to token ids, by byte pair encoding.
//
// Two rules for what merges first: a list of ranked pairs (HF's BPE) or the scores of the pieces
// (SentencePiece). Both take O(n log n) in the bytes of a piece.
//
// Errors:  INVALID_ARGUMENT  a merge that refers to an unknown token, scores that are not finite
// Threads: Encode is safe from several threads with distinct scratch space.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/tokenizer/bpe_merge.h"
#include "worker/tokenizer/vocabulary.h"

namespace walsh {

class BpeModel {
 public:
  virtual ~BpeModel() = default;
  // Appends the ids of `piece`.
  virtual void Encode(std::string_view piece, BpeScratch& scratch,
                      std::vector<int32_t>& ids) const = 0;
};

// Ids of the tokens <0x00> to <0xFF>; −1 for a missing one.
std::array<int32_t, 256> FindByteTokens(const Vocabulary& vocabulary);

struct RankedBpeOptions {
  // Pieces are bytes, spelt in the vocabulary by GPT-2's alphabet; else UTF-8 characters.
  bool is_byte_level = false;
  // A character outside the vocabulary becomes its bytes' tokens, if all of them exist.
  bool has_byte_fallback = false;
  bool fuses_unknown = false;
  // A piece that is a token needs no merges.
  bool ignores_merges = false;
  // False for tokens that were added on top of the model's own: text alone never becomes one.
  std::vector<bool> is_model_token = {};  // [vocabulary]
  int32_t unknown = -1;  // −1: an unknown character disappears, as in HF's implementation
};

// The vocabulary must outlive the model. `merges` come best first.
absl::StatusOr<std::unique_ptr<BpeModel>> MakeRankedBpe(
    const Vocabulary* vocabulary, std::span<const std::pair<std::string, std::string>> merges,
    const RankedBpeOptions& options);

// Only tokens whose `is_mergeable` is true come out of merges. The highest score merges first; what
// is an unused token in the end is taken apart again, as it was put together; what is no token
// becomes bytes, or one unknown token for a run.
struct ScoredBpeOptions {
  std::vector<float> scores = {};       // [vocabulary]
  std::vector<bool> is_mergeable = {};  // [vocabulary]
  std::vector<bool> is_unused = {};     // [vocabulary]
  bool has_byte_fallback = false;
  int32_t unknown = -1;
};
absl::StatusOr<std::unique_ptr<BpeModel>> MakeScoredBpe(const Vocabulary* vocabulary,
                                                        const ScoredBpeOptions& options);

}  // namespace walsh
