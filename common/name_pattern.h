// A pattern of names, as a shell's of files: which linears of a model an option is for.
//
//   *        any characters, dots too, or none
//   ?        one character
//   {a,b}    either text
//   {0-3}    a whole number of the range, both ends in it; {0-3,7,mlp} mixes them
//
// Everything else stands for itself; the whole name must match. Matching takes time in proportion
// to the lengths of pattern and name, whatever the pattern.
//
// Errors:  INVALID_ARGUMENT  says what is wrong, and at which character
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh {

class NamePattern {
 public:
  static absl::StatusOr<NamePattern> Parse(std::string_view pattern);
  bool Matches(std::string_view name) const;

 private:
  // One alternative of {…}.
  struct Choice {
    std::string text;
    bool is_range = false;
    int64_t low = 0, high = 0;
  };
  enum class Kind { kText, kAnyText, kAnyCharacter, kChoices };
  struct Part {
    Kind kind = Kind::kText;
    std::string text;
    std::vector<Choice> choices;
  };

  static absl::StatusOr<Choice> ParseChoice(std::string_view text, size_t position);

  std::vector<Part> parts_;
};

}  // namespace walsh
