#include "client/terminal/safe_text.h"

#include "common/utf8.h"

namespace walsh::client {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;

bool IsHarmful(uint32_t c) {
  if (c == '\n' || c == '\t') return false;
  if (c < 0x20 || (c >= 0x7F && c < 0xA0)) return true;
  // Marks, embeddings, overrides and isolates that reorder what is shown.
  return c == 0x061C || c == 0x200E || c == 0x200F || (c >= 0x202A && c <= 0x202E) ||
         (c >= 0x2066 && c <= 0x2069);
}

}  // namespace

std::string SafeText(std::string_view text) {
  std::string safe;
  safe.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const uint32_t code_point = NextCodePoint(text, &pos);
    AppendUtf8(IsHarmful(code_point) ? kReplacement : code_point, safe);
  }
  return safe;
}

size_t DisplayWidth(std::string_view text) {
  size_t width = 0;
  for (size_t pos = 0; pos < text.size(); ++width) NextCodePoint(text, &pos);
  return width;
}

}  // namespace walsh::client
