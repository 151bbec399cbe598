// Tokens that are found in the text itself, before any merging: special ones ("<|im_start|>") and
// those added to a vocabulary later.
//
// Finds the leftmost match, the longest among those that begin there, as HF's AddedVocabulary does,
// with its options: `single_word` (no letter, digit or underscore next to it), `lstrip` and
// `rstrip` (takes the white space on that side).
//
// Errors:  INVALID_ARGUMENT  too many tokens, or too long ones
// Threads: const methods are safe from several threads.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

namespace walsh {

struct AddedToken {
  int32_t id = -1;
  std::string content;  // as it appears in the text that is searched
  bool is_special = false;
  bool is_single_word = false;
  bool strips_left = false;
  bool strips_right = false;
};

class AddedTokens {
 public:
  // A stretch of text; `id` is −1 for text between tokens.
  struct Segment {
    int32_t id = -1;
    std::string_view text;
  };

  absl::Status Add(const AddedToken& token);
  // Cuts `text` at its added tokens. Special ones count as plain text unless `with_special`.
  std::vector<Segment> Split(std::string_view text, bool with_special) const;

 private:
  struct Match {
    int32_t token = -1;  // index in tokens_
    size_t size = 0;
  };
  Match LongestAt(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  // A trie over bytes: node and byte to the next node; node 0 is the root.
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  std::vector<int32_t> token_of_node_ = {-1};
  // Most bytes of a text begin no token; they are skipped without a look into the trie.
  std::array<bool, 256> begins_token_{};
  size_t bytes_ = 0;
};

}  // namespace walsh
