// The tokens of a template with a place among them, and the depth that parsing has reached.
//
// Threads: one stream is used by one thread.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "worker/tokenizer/jinja/lexer.h"

namespace walsh::jinja {

class TokenStream {
 public:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& current() const { return tokens_[at_]; }
  const Token& next() const { return tokens_[at_ + 1 < tokens_.size() ? at_ + 1 : at_]; }
  int line() const { return current().line; }

  bool Is(Token::Kind kind) const { return current().kind == kind; }
  bool IsOperator(std::string_view op) const {
    return Is(Token::Kind::kOperator) && current().text == op;
  }
  bool IsName(std::string_view name) const {
    return Is(Token::Kind::kName) && current().text == name;
  }

  // The last token, kEnd, is never passed.
  Token Take() {
    Token token = tokens_[at_];
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  bool TakeOperator(std::string_view op) { return IsOperator(op) && Advance(); }
  bool TakeName(std::string_view name) { return IsName(name) && Advance(); }

  absl::Status Expect(Token::Kind kind, std::string_view what) {
    if (!Is(kind)) return Unexpected(what);
    Advance();
    return absl::OkStatus();
  }
  absl::Status ExpectOperator(std::string_view op) {
    return TakeOperator(op) ? absl::OkStatus()
                            : Unexpected(absl::StrCat("'", std::string(op), "'"));
  }
  absl::StatusOr<std::string> ExpectName() {
    if (!Is(Token::Kind::kName)) return Unexpected("a name");
    return Take().text;
  }

  absl::Status Unexpected(std::string_view expected) const {
    const std::string found = Is(Token::Kind::kEnd)        ? "the end of the template"
                              : Is(Token::Kind::kBlockEnd) ? "'%}'"
                              : Is(Token::Kind::kOutputEnd)
                                  ? "'}}'"
                                  : absl::StrCat("'", current().text, "'");
    return SyntaxError(line(), absl::StrCat("expected ", std::string(expected), ", found ", found));
  }

  // Brackets and blocks around the current token. Enter must be followed by Leave.
  absl::Status Enter() {
    if (++depth_ <= limits::kTemplateDepthMax) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat("chat template, line ", line(),
                                                     ": nested deeper than ",
                                                     limits::kTemplateDepthMax, " levels"));
  }
  void Leave() { --depth_; }

 private:
  bool Advance() {
    Take();
    return true;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace walsh::jinja
