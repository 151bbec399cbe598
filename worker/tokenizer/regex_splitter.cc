#include "worker/tokenizer/regex_splitter.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"

namespace walsh {
namespace {

constexpr std::array kKnownPatterns = {kGpt2Pattern, kLlama3Pattern, kQwen2Pattern, kDigitPattern,
                                       kDigitsPattern};

// Unicode's White_Space.
constexpr std::string_view kSpaces =
    R"(\x{9}-\x{d} \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// A backstop: the known patterns need a handful of steps a character.
constexpr uint32_t kMatchLimit = 100'000'000;

std::string SpellOutSpaces(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && pattern[i + 1] == 's') {
      out += in_class ? std::string(kSpaces) : absl::StrCat("[", std::string(kSpaces), "]");
      ++i;
    } else if (c == '\\' && pattern[i + 1] == 'S') {
      out += absl::StrCat("[^", std::string(kSpaces), "]");
      ++i;
    } else if (c == '\\') {
      out.append(pattern.substr(i++, 2));
    } else {
      in_class = c == '[' || (in_class && c != ']');
      out += c;
    }
  }
  return out;
}

struct Free {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

PCRE2_SPTR Bytes(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

std::string ErrorText(int error) {
  std::array<PCRE2_UCHAR, 128> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

struct RegexSplitter::Code {
  std::unique_ptr<pcre2_code, Free> code;
  std::unique_ptr<pcre2_match_context, Free> context;
};

RegexSplitter::RegexSplitter(std::unique_ptr<Code> code) : code_(std::move(code)) {}
RegexSplitter::RegexSplitter(RegexSplitter&&) noexcept = default;
RegexSplitter& RegexSplitter::operator=(RegexSplitter&&) noexcept = default;
RegexSplitter::~RegexSplitter() = default;

absl::StatusOr<RegexSplitter> RegexSplitter::Create(std::string_view pattern) {
  if (std::find(kKnownPatterns.begin(), kKnownPatterns.end(), pattern) == kKnownPatterns.end()) {
    return absl::UnimplementedError(absl::StrCat("pre-tokenizer pattern \"",
                                                 std::string(pattern.substr(0, 256)),
                                                 "\" is none of those that walsh knows"));
  }
  const std::string spelled_out = SpellOutSpaces(pattern);
  auto code = std::make_unique<Code>();
  int error = 0;
  PCRE2_SIZE offset = 0;
  code->code.reset(pcre2_compile(Bytes(spelled_out), spelled_out.size(), PCRE2_UTF | PCRE2_UCP,
                                 &error, &offset, nullptr));
  code->context.reset(pcre2_match_context_create(nullptr));
  if (code->code == nullptr || code->context == nullptr) {
    return absl::InternalError(absl::StrCat("PCRE2 refuses a known pattern: ", ErrorText(error)));
  }
  // Where JIT is not available, the interpreter gives the same matches, more slowly.
  pcre2_jit_compile(code->code.get(), PCRE2_JIT_COMPLETE);
  pcre2_set_match_limit(code->context.get(), kMatchLimit);
  return RegexSplitter(std::move(code));
}

absl::Status RegexSplitter::Split(std::string_view text,
                                  std::vector<std::string_view>& pieces) const {
  const std::unique_ptr<pcre2_match_data, Free> match(pcre2_match_data_create(1, nullptr));
  if (match == nullptr) return absl::ResourceExhaustedError("PCRE2: out of memory");
  for (size_t done = 0; done < text.size();) {
    const int found = pcre2_match(code_->code.get(), Bytes(text), text.size(), done,
                                  PCRE2_NO_UTF_CHECK, match.get(), code_->context.get());
    if (found == PCRE2_ERROR_NOMATCH) {
      pieces.push_back(text.substr(done));
      break;
    }
    if (found < 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("pre-tokenizer, at byte ", done, ": ", ErrorText(found)));
    }
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    if (range[0] > done) pieces.push_back(text.substr(done, range[0] - done));
    pieces.push_back(text.substr(range[0], range[1] - range[0]));
    done = range[1];
  }
  return absl::OkStatus();
}

}  // namespace walsh
