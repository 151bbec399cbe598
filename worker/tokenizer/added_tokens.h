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
#include <cstddef>
#include <cstdint>
#include <optional>
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
  // After the last Add, before the first Split.
  void Finish();
  // Cuts `text` at its added tokens. Special ones count as plain text unless `with_special`.
  std::vector<Segment> Split(std::string_view text, bool with_special) const;

 private:
  struct Match {
    size_t begin = 0;
    int32_t token = -1;  // index in tokens_
  };
  int32_t Next(int32_t node, char byte) const;
  // The longest token at each byte of [begin, end) where one begins, in order.
  void FindMatches(std::string_view text, size_t begin, size_t end,
                   std::vector<Match>& matches) const;
  // What `token` at `begin` takes of the text behind `done`; nothing if its options forbid it.
  static std::optional<Segment> Cut(std::string_view text, size_t begin, const AddedToken& token,
                                    size_t done);

  std::vector<AddedToken> tokens_;
  // Aho and Corasick's automaton over the bytes of the reversed tokens. Texts are read from their
  // end, so that a state knows what begins at a byte, in time linear in the text. A trie of node
  // and byte to the next node, node 0 the root:
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  std::vector<int32_t> token_of_node_ = {-1};
  std::vector<int32_t> parent_ = {0};
  std::vector<char> byte_ = {0};
  std::vector<uint16_t> depth_ = {0};
  // The node of the longest proper suffix of a node's text, and the longest token among its
  // suffixes, itself included.
  std::vector<int32_t> fallback_ = {0};
  std::vector<int32_t> longest_of_node_ = {-1};
  // Most bytes of a text end no token; at the root they are skipped without a look into the trie.
  std::array<bool, 256> ends_token_{};
  size_t bytes_ = 0;
};

}  // namespace walsh
