// Cuts text into the pieces that byte pair encoding works on one by one.
//
// Covers what HF's pre-tokenizers Split, Digits, ByteLevel, Metaspace and Sequences of them do in
// the tokenizers that walsh reads. What they change in the text (a leading space, "▁" for " ")
// comes first, then the cuts, each inside the pieces of the one before.
//
// Errors:  RESOURCE_EXHAUSTED  a match limit
// Threads: Split is safe from several threads.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "worker/tokenizer/regex_splitter.h"

namespace walsh {

// "▁", U+2581, which stands for a space in SentencePiece's vocabularies.
inline constexpr std::string_view kMetaspace = "\xE2\x96\x81";

class PreTokenizer {
 public:
  struct Metaspace {
    enum class Prepend { kNever, kFirst, kAlways };
    Prepend prepend = Prepend::kAlways;
    // Cuts before every "▁".
    bool splits = true;
  };

  // A space before a text that does not begin with one (ByteLevel's add_prefix_space).
  bool adds_prefix_space = false;
  std::optional<Metaspace> metaspace;
  std::vector<RegexSplitter> splitters;

  // `text` is a stretch without added tokens; `is_first` tells whether the whole text begins with
  // it. The pieces are in `text` or in `buffer`.
  absl::Status Split(std::string_view text, bool is_first, std::string& buffer,
                     std::vector<std::string_view>& pieces) const;
};

}  // namespace walsh
