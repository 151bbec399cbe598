#include "tests/fuzz/json_mutator.h"

#include <algorithm>
#include <random>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/utf8.h"
#include "tests/fuzz/mutate_bytes.h"

namespace walsh::fuzz {
namespace {

// Where parsers go wrong: signs, widths, emptiness, another type.
constexpr std::string_view kScalars[] = {"0",
                                         "1",
                                         "-1",
                                         "0.5",
                                         "1e308",
                                         "2147483647",
                                         "-2147483648",
                                         "9223372036854775807",
                                         "-9223372036854775808",
                                         "18446744073709551615",
                                         "9007199254740992",
                                         "1048576",
                                         R"("")",
                                         "true",
                                         "false",
                                         "null",
                                         "[]",
                                         "{}"};

constexpr std::string_view kSpace = " \t\r\n";

// Where the values of a document are. Numbers and literals are not looked at.
class Values {
 public:
  struct Value {
    size_t key_begin;  // of a member's key, its quotes with it; `begin` where there is none
    size_t key_end;
    size_t begin;
    size_t end;
    bool has_children;

    bool has_key() const { return key_begin < begin; }
  };

  explicit Values(std::string_view text) : text_(text) {
    const bool is_read = Walk(0);
    SkipSpace();
    is_json_ = is_read && at_ == text_.size();
  }
  // Whether brackets, strings and commas are where they should be.
  bool is_json() const { return is_json_; }
  // A value before its children; the first is the document.
  const std::vector<Value>& values() const { return values_; }

 private:
  // Recursive: no deeper than any parser of ours goes on reading.
  static constexpr int kDepthMax = 64;

  bool Walk(int depth) {
    SkipSpace();
    const size_t index = values_.size();
    values_.push_back({.key_begin = at_, .key_end = at_, .begin = at_});
    const bool is_read = Skip('{')   ? Children('}', depth)
                         : Skip('[') ? Children(']', depth)
                         : Peek('"') ? String()
                                     : Literal();
    values_[index].end = at_;
    values_[index].has_children = index + 1 < values_.size();
    return is_read;
  }
  bool Children(char closing, int depth) {
    if (depth == kDepthMax) return false;
    SkipSpace();
    if (Skip(closing)) return true;
    do {
      SkipSpace();
      const size_t key_begin = at_;
      if (closing == '}' && !String()) return false;
      const size_t key_end = at_;
      SkipSpace();
      if (closing == '}' && !Skip(':')) return false;
      const size_t index = values_.size();
      if (!Walk(depth + 1)) return false;
      if (closing == '}') {
        values_[index].key_begin = key_begin;
        values_[index].key_end = key_end;
      }
      SkipSpace();
    } while (Skip(','));
    return Skip(closing);
  }
  bool String() {
    if (!Skip('"')) return false;
    while (at_ < text_.size() && text_[at_] != '"') at_ += text_[at_] == '\\' ? 2 : 1;
    at_ = std::min(at_, text_.size());
    return Skip('"');
  }
  bool Literal() {
    const size_t begin = at_;
    while (at_ < text_.size() &&
           (absl::ascii_isalnum(Byte()) || Peek('-') || Peek('+') || Peek('.')))
      ++at_;
    return at_ > begin;
  }
  void SkipSpace() { at_ = std::min(text_.find_first_not_of(kSpace, at_), text_.size()); }
  bool Skip(char c) {
    if (!Peek(c)) return false;
    ++at_;
    return true;
  }
  bool Peek(char c) const { return at_ < text_.size() && text_[at_] == c; }
  unsigned char Byte() const { return static_cast<unsigned char>(text_[at_]); }

  std::string_view text_;
  size_t at_ = 0;
  bool is_json_ = false;
  std::vector<Value> values_;
};

// Text between the quotes of a JSON string, from what nearly is.
std::string Escaped(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\\' && i + 1 < text.size() &&
        std::string_view("\"\\/bfnrtu").find(text[i + 1]) != std::string_view::npos) {
      out.append({c, text[++i]});
    } else if (c == '"' || c == '\\') {
      out.append({'\\', c});
    } else if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) {
      absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned char>(c));
    } else {
      out += c;
    }
  }
  return ReplaceInvalidUtf8(out);
}

class Mutator {
 public:
  using Value = Values::Value;

  Mutator(std::string_view text, const std::vector<Value>& values, uint32_t seed)
      : text_(text), values_(values), random_(seed) {}

  std::string ChangeOne() {
    const Value& value = AnyValue();
    switch (Below(6)) {
      case 0:
        return Replaced(value, Scalar());
      case 1:
        return Replaced(value, Text(AnyValue()));
      case 2:
        return Erased(value);
      case 3:
        return Added(value);
      default:
        return Adjusted(value);
    }
  }

 private:
  size_t Below(size_t n) { return random_() % n; }
  template <typename T, size_t n>
  const T& AnyOf(const T (&these)[n]) {
    return these[Below(n)];
  }
  const Value& AnyValue() { return values_[Below(values_.size())]; }
  std::string_view Scalar() { return AnyOf(kScalars); }
  std::string_view Text(const Value& value) const {
    return text_.substr(value.begin, value.end - value.begin);
  }
  std::string_view Key(const Value& value) const {
    return text_.substr(value.key_begin, value.key_end - value.key_begin);
  }

  std::string Replaced(size_t begin, size_t end, std::string_view by) const {
    return absl::StrCat(std::string(text_.substr(0, begin)), std::string(by),
                        std::string(text_.substr(end)));
  }
  std::string Replaced(const Value& value, std::string_view by) const {
    return Replaced(value.begin, value.end, by);
  }

  // With the comma after it or, for the last one, before it.
  std::string Erased(const Value& value) const {
    if (&value == &values_.front()) return std::string(text_);
    const size_t after = text_.find_first_not_of(kSpace, value.end);
    if (text_[after] == ',') return Replaced(value.key_begin, after + 1, "");
    const size_t before = text_.find_last_not_of(kSpace, value.key_begin - 1);
    const bool is_alone = text_[before] != ',';
    return Replaced(is_alone ? value.key_begin : before, value.end, "");
  }

  // A copy of any value: inside an empty array or object, before any other value.
  std::string Added(const Value& value) {
    const std::string_view copy = Text(AnyValue());
    const bool is_empty_object = !value.has_children && text_[value.begin] == '{';
    const bool is_empty_array = !value.has_children && text_[value.begin] == '[';
    const std::string key = is_empty_object || value.has_key() ? AnyKey() + ":" : "";
    if (is_empty_object || is_empty_array) {
      const std::string opening(1, text_[value.begin]);
      const std::string closing(1, text_[value.end - 1]);
      return Replaced(value, absl::StrCat(opening, key, std::string(copy), closing));
    }
    if (&value == &values_.front()) return Replaced(value, copy);
    return Replaced(value.key_begin, value.key_begin, absl::StrCat(key, std::string(copy), ","));
  }

  // One that is there, or one with other bytes.
  std::string AnyKey() {
    const Value& value = AnyValue();
    const std::string key = value.has_key() ? std::string(Key(value)) : "\"key\"";
    return Below(2) == 0 ? key : MutatedString(key);
  }
  static std::string MutatedString(std::string_view quoted) {
    return absl::StrCat(
        "\"", Escaped(MutateBytes(std::string(quoted.substr(1, quoted.size() - 2)))), "\"");
  }

  std::string Adjusted(const Value& value) {
    if (value.has_key() && Below(4) == 0) {
      return Replaced(value.key_begin, value.key_end, MutatedString(Key(value)));
    }
    const std::string text(Text(value));
    if (text.front() == '"') return Replaced(value, MutatedString(text));
    if (text == "true") return Replaced(value, "false");
    if (text == "false") return Replaced(value, "true");
    return Replaced(value, Near(text));
  }
  // A number near it; any scalar for what is none.
  std::string Near(const std::string& text) {
    uint64_t whole = 0;
    if (absl::SimpleAtoi(text, &whole)) {
      const uint64_t near[] = {whole + 1, whole - 1, whole * 2, whole / 2, whole + 32};
      return absl::StrCat(AnyOf(near));
    }
    double real = 0;
    if (absl::SimpleAtod(text, &real)) {
      const double near[] = {-real, real * 2, real / 1024, real + 1};
      return absl::StrCat(AnyOf(near));
    }
    return std::string(Scalar());
  }

  std::string_view text_;
  const std::vector<Value>& values_;
  std::minstd_rand random_;
};

}  // namespace

std::optional<std::string> MutateJson(std::string_view text, uint32_t seed) {
  const Values walked(text);
  if (!walked.is_json()) return std::nullopt;
  return Mutator(text, walked.values(), seed).ChangeOne();
}

size_t MutateJsonInput(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  std::optional<std::string> mutated;
  if (seed % 4 != 0) {
    mutated = MutateJson({reinterpret_cast<const char*>(data), size}, seed / 4);
  }
  return mutated ? Deliver(*mutated, data, size_max) : LLVMFuzzerMutate(data, size, size_max);
}

}  // namespace walsh::fuzz
