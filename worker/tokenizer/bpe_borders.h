// Places in a text that no merge can cross, so that long texts fall into short words.
//
// Between two characters that stand side by side in no token of the vocabulary nothing can merge:
// whatever joins across them would be such a token. To merge the words one by one gives the same
// tokens as the whole text at once, with small heaps. In most SentencePiece vocabularies these
// borders are the words' own.
//
// Threads: const methods are safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/container/flat_hash_set.h"
#include "common/utf8.h"

namespace walsh {

class BpeBorders {
 public:
  void AddToken(std::string_view spelling) {
    if (spelling.empty()) return;
    size_t pos = 0;
    uint32_t left = NextCodePoint(spelling, &pos);
    while (pos < spelling.size()) {
      const uint32_t right = NextCodePoint(spelling, &pos);
      neighbours_.insert(Pair(left, right));
      left = right;
    }
  }

  bool Separates(uint32_t left, uint32_t right) const {
    return !neighbours_.contains(Pair(left, right));
  }

 private:
  static uint64_t Pair(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }

  absl::flat_hash_set<uint64_t> neighbours_;
};

}  // namespace walsh
