#include "worker/tokenizer/jinja/lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

// A name is hashed wherever it is looked up.
constexpr size_t kNameBytesMax = 256;

// Longest first, so that "**" is not two "*".
constexpr std::array<std::string_view, 26> kOperators = {
    "//", "**", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "[",
    "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};

// \r\n and \r become \n; one newline at the end goes.
std::string NormalizeNewlines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
      out.push_back('\n');
    } else {
      out.push_back(source[i]);
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

bool IsNameStart(char c) { return absl::ascii_isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool IsNamePart(char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// The value of \x…, \u… and \U…: `n_digits` of them at `pos`.
std::optional<uint32_t> HexAt(std::string_view text, size_t pos, size_t n_digits) {
  if (pos + n_digits > text.size()) return std::nullopt;
  uint32_t value = 0;
  const char* begin = text.data() + pos;
  const auto [end, error] = std::from_chars(begin, begin + n_digits, value, 16);
  if (error != std::errc() || end != begin + n_digits || value > 0x10FFFF) return std::nullopt;
  return value;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(NormalizeNewlines(source)), rest_(source_) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (!rest_.empty()) {
      const size_t tag = FindTag();
      ReadText(tag);
      if (rest_.empty()) break;
      WALSH_RETURN_IF_ERROR(ReadTag());
    }
    Add(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  // The next "{{", "{%" or "{#"; the end of the source, if there is none.
  size_t FindTag() const {
    for (size_t at = rest_.find('{'); at != std::string_view::npos; at = rest_.find('{', at + 1)) {
      const char kind = at + 1 < rest_.size() ? rest_[at + 1] : '\0';
      if (kind == '{' || kind == '%' || kind == '#') return at;
    }
    return rest_.size();
  }

  void Add(Token::Kind kind, std::string text) {
    tokens_.push_back({.kind = kind, .text = std::move(text), .line = line_});
  }

  // Consumes `n` bytes and counts their lines.
  std::string_view Take(size_t n) {
    const std::string_view taken = rest_.substr(0, n);
    line_ += static_cast<int>(std::count(taken.begin(), taken.end(), '\n'));
    rest_.remove_prefix(n);
    return taken;
  }

  // Text up to a tag. The tag's sign, or lstrip_blocks, trims its end.
  void ReadText(size_t size) {
    const std::string_view tag = rest_.substr(size);
    const char sign = tag.size() > 2 ? tag[2] : '\0';
    const int line = line_;
    std::string_view text = Take(size);
    if (!tag.empty() && sign == '-') {
      text = Strip(text, std::nullopt, Side::kRight);
    } else if (!tag.empty() && sign != '+' && tag[1] != '{') {
      const size_t line_begin = text.rfind('\n') + 1;
      if ((line_begin > 0 || at_line_start_) &&
          Strip(text.substr(line_begin), std::nullopt, Side::kBoth).empty()) {
        text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) {
      tokens_.push_back({.kind = Token::Kind::kText, .text = std::string(text), .line = line});
    }
  }

  absl::Status ReadTag() {
    const char kind = rest_[1];
    const bool has_sign = rest_.size() > 2 && (rest_[2] == '-' || rest_[2] == '+');
    if (kind == '#') return SkipComment(has_sign ? 3 : 2);
    const bool is_output = kind == '{';
    Add(is_output ? Token::Kind::kOutputBegin : Token::Kind::kBlockBegin, "");
    const int line = line_;
    Take(has_sign ? 3 : 2);
    while (true) {
      SkipSpace();
      if (rest_.empty()) {
        return SyntaxError(line, is_output ? "'{{' without '}}'" : "'{%' without '%}'");
      }
      if (brackets_.empty() && TakeTagEnd(is_output)) return absl::OkStatus();
      WALSH_RETURN_IF_ERROR(ReadToken());
    }
  }

  absl::Status SkipComment(size_t begin) {
    const size_t end = rest_.find("#}", begin);
    if (end == std::string_view::npos) return SyntaxError(line_, "'{#' without '#}'");
    const char sign = end > begin ? rest_[end - 1] : '\0';
    Take(end + 2);
    TrimAfterTag(sign, /*trims_newline=*/true);
    return absl::OkStatus();
  }

  // "-}}", "}}", "-%}", "+%}" or "%}".
  bool TakeTagEnd(bool is_output) {
    const std::string_view end = is_output ? "}}" : "%}";
    char sign = rest_.front();
    const bool has_sign = sign == '-' || (sign == '+' && !is_output);
    if (!rest_.substr(has_sign ? 1 : 0).starts_with(end)) return false;
    if (!has_sign) sign = '\0';
    Take(end.size() + (has_sign ? 1 : 0));
    Add(is_output ? Token::Kind::kOutputEnd : Token::Kind::kBlockEnd, "");
    TrimAfterTag(sign, /*trims_newline=*/!is_output);
    return true;
  }

  // White space after a tag: all of it after "-", one newline by trim_blocks.
  void TrimAfterTag(char sign, bool trims_newline) {
    at_line_start_ = false;
    if (sign == '-') {
      const size_t n = rest_.size() - Strip(rest_, std::nullopt, Side::kLeft).size();
      at_line_start_ = Take(n).ends_with('\n');
    } else if (trims_newline && sign != '+' && rest_.starts_with('\n')) {
      Take(1);
      at_line_start_ = true;
    }
  }

  void SkipSpace() { Take(rest_.size() - Strip(rest_, std::nullopt, Side::kLeft).size()); }

  absl::Status ReadToken() {
    const char c = rest_.front();
    if (c == '\'' || c == '"') return ReadString();
    if (IsDigit(c)) return ReadNumber();
    if (IsNameStart(c)) {
      const auto end = std::find_if_not(rest_.begin(), rest_.end(), IsNamePart);
      const size_t n = static_cast<size_t>(end - rest_.begin());
      if (n > kNameBytesMax) return NotSupported(line_, absl::StrCat("a name of ", n, " bytes"));
      Add(Token::Kind::kName, std::string(rest_.substr(0, n)));
      Take(n);
      return absl::OkStatus();
    }
    for (const std::string_view op : kOperators) {
      if (!rest_.starts_with(op)) continue;
      WALSH_RETURN_IF_ERROR(Balance(c));
      Add(Token::Kind::kOperator, std::string(op));
      Take(op.size());
      return absl::OkStatus();
    }
    size_t end = 0;
    NextCodePoint(rest_, &end);
    return SyntaxError(
        line_, absl::StrCat("unexpected character '", std::string(rest_.substr(0, end)), "'"));
  }

  // Inside brackets "}}" closes two of them, not the tag.
  absl::Status Balance(char c) {
    if (c == '(') brackets_.push_back(')');
    if (c == '[') brackets_.push_back(']');
    if (c == '{') brackets_.push_back('}');
    if (c != ')' && c != ']' && c != '}') return absl::OkStatus();
    if (brackets_.empty() || brackets_.back() != c) {
      return SyntaxError(line_, absl::StrCat("unexpected '", std::string(1, c), "'"));
    }
    brackets_.pop_back();
    return absl::OkStatus();
  }

  // Digits with a fraction or an exponent, perhaps with single underscores between digits.
  absl::Status ReadNumber() {
    size_t end = 0;
    std::string digits;
    const auto read_digits = [&] {
      while (end < rest_.size() &&
             (IsDigit(rest_[end]) || (rest_[end] == '_' && end + 1 < rest_.size() &&
                                      IsDigit(rest_[end + 1]) && IsDigit(rest_[end - 1])))) {
        if (rest_[end] != '_') digits.push_back(rest_[end]);
        ++end;
      }
    };
    const auto at = [&](size_t pos) { return pos < rest_.size() ? rest_[pos] : '\0'; };
    read_digits();
    Token::Kind kind = Token::Kind::kInteger;
    if (at(end) == '.' && IsDigit(at(end + 1))) {
      kind = Token::Kind::kReal;
      digits.push_back('.');
      ++end;
      read_digits();
    }
    const size_t exponent = at(end + 1) == '+' || at(end + 1) == '-' ? end + 2 : end + 1;
    if ((at(end) == 'e' || at(end) == 'E') && IsDigit(at(exponent))) {
      kind = Token::Kind::kReal;
      digits.append(rest_.substr(end, exponent - end));
      end = exponent;
      read_digits();
    }
    const bool has_leading_zero = kind == Token::Kind::kInteger && digits.size() > 1 &&
                                  digits.find_first_not_of('0') != std::string::npos &&
                                  digits[0] == '0';
    if (has_leading_zero || IsNameStart(at(end))) {
      return NotSupported(line_,
                          absl::StrCat("number '", std::string(rest_.substr(0, end + 1)), "'"));
    }
    Add(kind, std::move(digits));
    Take(end);
    return absl::OkStatus();
  }

  absl::Status ReadString() {
    const char quote = rest_.front();
    size_t end = 1;
    while (end < rest_.size() && rest_[end] != quote) end += rest_[end] == '\\' ? 2 : 1;
    if (end >= rest_.size()) return SyntaxError(line_, "a string does not end");
    WALSH_ASSIGN_OR_RETURN(std::string value, Unescape(rest_.substr(1, end - 1)));
    Add(Token::Kind::kString, std::move(value));
    Take(end + 1);
    return absl::OkStatus();
  }

  // Python's escapes of a string literal; an unknown one stays as it is.
  absl::StatusOr<std::string> Unescape(std::string_view text) const {
    constexpr std::string_view kFrom = "abfnrtv\\'\"";
    constexpr std::string_view kTo = "\a\b\f\n\r\t\v\\'\"";
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\') {
        out.push_back(text[i]);
        continue;
      }
      const char c = text[++i];
      const size_t n_digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
      if (const size_t known = kFrom.find(c); known != std::string_view::npos) {
        out.push_back(kTo[known]);
      } else if (n_digits > 0) {
        const std::optional<uint32_t> value = HexAt(text, i + 1, n_digits);
        if (!value) return SyntaxError(line_, "a malformed escape in a string");
        AppendUtf8(*value, out);
        i += n_digits;
      } else if (IsDigit(c) || c == 'N') {
        return NotSupported(line_, absl::StrCat("the escape '\\", std::string(1, c), "'"));
      } else if (c != '\n') {
        out.push_back('\\');
        out.push_back(c);
      }
    }
    return out;
  }

  const std::string source_;
  std::string_view rest_;
  std::vector<Token> tokens_;
  std::vector<char> brackets_;
  int line_ = 1;
  bool at_line_start_ = true;
};

}  // namespace

absl::Status SyntaxError(int line, std::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat("chat template, line ", line, ": ", std::string(problem)));
}

absl::Status NotSupported(int line, std::string_view construct) {
  return absl::UnimplementedError(absl::StrCat("chat template, line ", line, ": ",
                                               std::string(construct), " is not supported"));
}

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) { return Lexer(source).Run(); }

}  // namespace walsh::jinja
