#include "common/utf8.h"

#include <algorithm>
#include <cstring>

namespace walsh {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;

struct Decoded {
  uint32_t code_point = kReplacement;
  // The character, or the maximal part of a valid one that stands here: at least 1.
  size_t n_bytes = 1;
  bool valid = false;
  // Not valid only because the text ends: more bytes could complete it.
  bool incomplete = false;
};

// Unicode 15, table 3-7: the second byte's range depends on the first byte, which is what rules out
// overlong forms, surrogates and values above U+10FFFF.
Decoded DecodeAt(std::string_view text, size_t pos) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[pos + i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {.code_point = first, .n_bytes = 1, .valid = true};
  size_t n_bytes = 0;
  uint32_t code_point = 0;
  unsigned low = 0x80;
  unsigned high = 0xBF;
  if (first >= 0xC2 && first <= 0xDF) {
    n_bytes = 2;
    code_point = first & 0x1F;
  } else if (first >= 0xE0 && first <= 0xEF) {
    n_bytes = 3;
    code_point = first & 0x0F;
    if (first == 0xE0) low = 0xA0;
    if (first == 0xED) high = 0x9F;
  } else if (first >= 0xF0 && first <= 0xF4) {
    n_bytes = 4;
    code_point = first & 0x07;
    if (first == 0xF0) low = 0x90;
    if (first == 0xF4) high = 0x8F;
  } else {
    return {};
  }
  for (size_t i = 1; i < n_bytes; ++i) {
    if (pos + i >= text.size()) return {.n_bytes = i, .incomplete = true};
    const unsigned next = byte(i);
    if (next < low || next > high) return {.n_bytes = i};
    code_point = (code_point << 6) | (next & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {.code_point = code_point, .n_bytes = n_bytes, .valid = true};
}

}  // namespace

bool IsValidUtf8(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    // Most text is ASCII, eight bytes of which are seen at once.
    uint64_t bytes = 0;
    if (text.size() - pos >= sizeof(bytes)) {
      std::memcpy(&bytes, text.data() + pos, sizeof(bytes));
      if ((bytes & 0x8080808080808080u) == 0) {
        pos += sizeof(bytes);
        continue;
      }
    }
    const Decoded decoded = DecodeAt(text, pos);
    if (!decoded.valid) return false;
    pos += decoded.n_bytes;
  }
  return true;
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const Decoded decoded = DecodeAt(text, pos);
    if (decoded.valid) {
      out.append(text.substr(pos, decoded.n_bytes));
    } else {
      AppendUtf8(kReplacement, out);
    }
    pos += decoded.n_bytes;
  }
  return out;
}

std::string_view Utf8Prefix(std::string_view text, size_t bytes_max) {
  if (text.size() <= bytes_max) return text;
  // A cut is inside a character when the byte after it is a continuation of one that began at most
  // three bytes earlier. Bytes that are no UTF-8 are cut anywhere.
  for (size_t begin = bytes_max; begin > 0 && bytes_max - begin < 3;) {
    --begin;
    const Decoded decoded = DecodeAt(text, begin);
    if (decoded.valid && begin + decoded.n_bytes > bytes_max) return text.substr(0, begin);
  }
  return text.substr(0, bytes_max);
}

void AppendUtf8(uint32_t code_point, std::string& out) {
  if (code_point > 0x10FFFF || (code_point >= 0xD800 && code_point <= 0xDFFF)) {
    code_point = kReplacement;
  }
  const auto put = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

size_t IncompleteUtf8Suffix(std::string_view text) {
  for (size_t n = 1; n <= std::min<size_t>(3, text.size()); ++n) {
    const Decoded decoded = DecodeAt(text, text.size() - n);
    if (decoded.incomplete && decoded.n_bytes == n) return n;
  }
  return 0;
}

uint32_t NextCodePoint(std::string_view text, size_t* pos) {
  const Decoded decoded = DecodeAt(text, *pos);
  *pos += decoded.valid ? decoded.n_bytes : 1;
  return decoded.code_point;
}

}  // namespace walsh
