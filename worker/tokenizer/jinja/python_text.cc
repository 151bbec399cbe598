#include "worker/tokenizer/jinja/python_text.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "common/utf8.h"

namespace walsh::jinja {
namespace {

// str.isspace(): white space by Unicode's bidirectional type or category, as Python has it.
bool IsSpace(uint32_t c) {
  return (c >= 0x9 && c <= 0xD) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

std::string Reversed(std::string_view text) { return {text.rbegin(), text.rend()}; }

size_t StartOfLast(std::string_view text) {
  size_t pos = text.size() - 1;
  while (pos > 0 && (text[pos] & 0xC0) == 0x80) --pos;
  return pos;
}

uint32_t CodePointAt(std::string_view text, size_t pos) { return NextCodePoint(text, &pos); }

bool IsLineBreak(uint32_t c) {
  return (c >= 0xA && c <= 0xD) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

bool IsCased(uint32_t c) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL ||
         category == UTF8PROC_CATEGORY_LT;
}

uint32_t ToUpper(uint32_t c) {
  return static_cast<uint32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}
uint32_t ToLower(uint32_t c) {
  return static_cast<uint32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}

template <typename Mapping>
std::string MapCodePoints(std::string_view text, Mapping mapping) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) AppendUtf8(mapping(NextCodePoint(text, &pos)), out);
  return out;
}

bool IsPrintable(uint32_t c) {
  if (c == ' ') return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

void AppendHex(uint32_t value, int n_digits, std::string& out) {
  constexpr std::string_view kHex = "0123456789abcdef";
  for (int shift = 4 * (n_digits - 1); shift >= 0; shift -= 4) {
    out.push_back(kHex[(value >> shift) & 15]);
  }
}

}  // namespace

size_t FindText(std::string_view text, std::string_view part) {
  // string_view::find takes the product of the two sizes.
  const void* found = memmem(text.data(), text.size(), part.data(), part.size());
  if (found == nullptr && !part.empty()) return std::string_view::npos;
  return part.empty() ? 0 : static_cast<size_t>(static_cast<const char*>(found) - text.data());
}

size_t FindLastText(std::string_view text, std::string_view part) {
  const size_t at = FindText(Reversed(text), Reversed(part));
  return at == std::string_view::npos ? at : text.size() - at - part.size();
}

std::string_view Strip(std::string_view text, std::optional<std::string_view> characters,
                       Side side) {
  absl::flat_hash_set<uint32_t> stripped;
  for (size_t pos = 0; characters && pos < characters->size();) {
    stripped.insert(NextCodePoint(*characters, &pos));
  }
  const auto is_stripped = [&](size_t begin) {
    const uint32_t c = CodePointAt(text, begin);
    return characters ? stripped.contains(c) : IsSpace(c);
  };
  while (side != Side::kRight && !text.empty()) {
    size_t end = 0;
    NextCodePoint(text, &end);
    if (!is_stripped(0)) break;
    text.remove_prefix(end);
  }
  while (side != Side::kLeft && !text.empty()) {
    const size_t begin = StartOfLast(text);
    if (!is_stripped(begin)) break;
    text.remove_suffix(text.size() - begin);
  }
  return text;
}

std::vector<std::string_view> SplitAtSpace(std::string_view text, int64_t splits_max) {
  std::vector<std::string_view> parts;
  text = Strip(text, std::nullopt, Side::kLeft);
  while (!text.empty()) {
    if (splits_max >= 0 && static_cast<int64_t>(parts.size()) == splits_max) {
      parts.push_back(text);
      break;
    }
    size_t end = 0;
    for (size_t next = 0; next < text.size(); end = next) {
      if (IsSpace(NextCodePoint(text, &next))) break;
    }
    parts.push_back(text.substr(0, end));
    text = Strip(text.substr(end), std::nullopt, Side::kLeft);
  }
  return parts;
}

std::vector<std::string_view> SplitAt(std::string_view text, std::string_view separator,
                                      int64_t splits_max) {
  std::vector<std::string_view> parts;
  while (splits_max < 0 || static_cast<int64_t>(parts.size()) < splits_max) {
    const size_t at = FindText(text, separator);
    if (at == std::string_view::npos) break;
    parts.push_back(text.substr(0, at));
    text.remove_prefix(at + separator.size());
  }
  parts.push_back(text);
  return parts;
}

std::vector<std::string_view> SplitAtFromRight(std::string_view text, std::string_view separator,
                                               int64_t splits_max) {
  const std::string reversed = Reversed(text);
  std::vector<std::string_view> parts;
  size_t begin = 0;  // in `reversed`
  for (const std::string_view part : SplitAt(reversed, Reversed(separator), splits_max)) {
    parts.push_back(text.substr(text.size() - begin - part.size(), part.size()));
    begin += part.size() + separator.size();
  }
  std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> SplitLines(std::string_view text) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t pos = 0; pos < text.size();) {
    const size_t end = pos;
    if (!IsLineBreak(NextCodePoint(text, &pos))) continue;
    if (text[end] == '\r' && pos < text.size() && text[pos] == '\n') ++pos;
    lines.push_back(text.substr(begin, end - begin));
    begin = pos;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string Replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t count_max) {
  std::string out;
  if (from.empty()) {
    // Python puts `to` before every character and at the end.
    int64_t count = 0;
    const auto put = [&] {
      if (count_max < 0 || count < count_max) out.append(to);
      ++count;
    };
    for (const std::string_view c : CodePoints(text)) {
      put();
      out.append(c);
    }
    put();
    return out;
  }
  const std::vector<std::string_view> parts = SplitAt(text, from, count_max);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) out.append(to);
    out.append(parts[i]);
  }
  return out;
}

std::string Upper(std::string_view text) { return MapCodePoints(text, ToUpper); }

std::string Lower(std::string_view text) { return MapCodePoints(text, ToLower); }

std::string Capitalize(std::string_view text) {
  bool is_first = true;
  return MapCodePoints(
      text, [&](uint32_t c) { return std::exchange(is_first, false) ? ToUpper(c) : ToLower(c); });
}

std::string Title(std::string_view text) {
  bool after_cased = false;
  return MapCodePoints(text, [&](uint32_t c) {
    const bool was_after = std::exchange(after_cased, IsCased(c));
    return was_after ? ToLower(c) : ToUpper(c);
  });
}

bool HasDigitBeyondAscii(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    const uint32_t c = NextCodePoint(text, &pos);
    if (c >= 0x80 && utf8proc_category(static_cast<utf8proc_int32_t>(c)) == UTF8PROC_CATEGORY_ND) {
      return true;
    }
  }
  return false;
}

size_t CountCodePoints(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

std::vector<std::string_view> CodePoints(std::string_view text) {
  std::vector<std::string_view> out;
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    NextCodePoint(text, &pos);
    out.push_back(text.substr(begin, pos - begin));
  }
  return out;
}

std::string ReprOfString(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, quote);
  for (size_t pos = 0; pos < text.size();) {
    const uint32_t c = NextCodePoint(text, &pos);
    if (c == '\\' || c == static_cast<uint32_t>(quote)) {
      out.push_back('\\');
      out.push_back(static_cast<char>(c));
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (IsPrintable(c)) {
      AppendUtf8(c, out);
    } else {
      out += c < 0x100 ? "\\x" : c < 0x10000 ? "\\u" : "\\U";
      AppendHex(c, c < 0x100 ? 2 : c < 0x10000 ? 4 : 8, out);
    }
  }
  out.push_back(quote);
  return out;
}

std::string ReprOfReal(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  std::array<char, 64> buffer{};
  const double size = std::abs(value);
  // Python changes to an exponent below 1e-4 and from 1e16 on.
  const bool has_exponent = size != 0.0 && (size < 1e-4 || size >= 1e16);
  const auto format = has_exponent ? std::chars_format::scientific : std::chars_format::fixed;
  const auto end = std::to_chars(buffer.begin(), buffer.end(), value, format).ptr;
  std::string out(buffer.begin(), end);
  if (!has_exponent && out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::string JsonOfString(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += "\\u";
          AppendHex(static_cast<unsigned char>(c), 4, out);
        } else {
          out.push_back(c);
        }
    }
  }
  return out + "\"";
}

std::string EscapeNonAscii(std::string_view json) {
  std::string out;
  for (size_t pos = 0; pos < json.size();) {
    const uint32_t c = NextCodePoint(json, &pos);
    if (c < 0x7f) {
      out.push_back(static_cast<char>(c));
      continue;
    }
    const bool is_pair = c >= 0x10000;
    out += "\\u";
    AppendHex(is_pair ? 0xD7C0 + (c >> 10) : c, 4, out);
    if (!is_pair) continue;
    out += "\\u";
    AppendHex(0xDC00 + (c & 0x3FF), 4, out);
  }
  return out;
}

}  // namespace walsh::jinja
