// Splits text at the matches of a known regular expression, as HF's pre-tokenizer Split does with
// behaviour Isolated: matches and the gaps between them, in order, nothing lost.
//
// Only patterns of an allow list are compiled: each takes time linear in the text, which a pattern
// from a stranger's file need not. They run in PCRE2 with UTF, UCP and JIT. PCRE2's own \s is not
// used, because it takes U+180E for a space, which Unicode and the original engines do not; each
// \s and \S of a pattern is spelt out as Unicode's White_Space.
//
// Errors:  UNIMPLEMENTED       the pattern is not on the list
//          RESOURCE_EXHAUSTED  a match limit of PCRE2
// Threads: Split is safe from several threads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/pre_tokenizer_conventions.h"

namespace walsh {

// HF's pre-tokenizer Digits, one by one and in runs.
inline constexpr std::string_view kDigitPattern = R"(\p{N})";
inline constexpr std::string_view kDigitsPattern = R"(\p{N}+)";

class RegexSplitter {
 public:
  static absl::StatusOr<RegexSplitter> Create(std::string_view pattern);
  RegexSplitter(RegexSplitter&&) noexcept;
  RegexSplitter& operator=(RegexSplitter&&) noexcept;
  ~RegexSplitter();

  // Appends the pieces of `text`, which must be valid UTF-8 and outlive them.
  absl::Status Split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Code;
  explicit RegexSplitter(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

}  // namespace walsh
