// A template's source as tokens, white space already trimmed as Hugging Face sets Jinja:
// trim_blocks and lstrip_blocks on, one newline at the end dropped.
//
// Source:  Jinja 3.1, "Template Designer Documentation", section "Whitespace Control", and the
// rules
//          of its lexer where the page is silent.
// Errors:  INVALID_ARGUMENT  with the line
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::jinja {

struct Token {
  enum class Kind {
    kText,
    kOutputBegin,  // {{
    kOutputEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,  // text: the value, escapes resolved
    kInteger,
    kReal,
    kOperator,
    kEnd,
  };
  Kind kind = Kind::kEnd;
  std::string text;
  int line = 1;
};

// The last token is kEnd.
absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

// INVALID_ARGUMENT and UNIMPLEMENTED with "line N: " in front.
absl::Status SyntaxError(int line, std::string_view problem);
absl::Status NotSupported(int line, std::string_view construct);

}  // namespace walsh::jinja
