#include "worker/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/utf8.h"

namespace walsh {
namespace {

// "▁" for a space takes 3 times the bytes, and so does the worst of NFC.
constexpr size_t kGrowthMax = 16;
constexpr size_t kGrowthBytesMin = 4096;

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c & 0x80) == 0; });
}

int CombiningClass(int32_t code_point) {
  return utf8proc_get_property(code_point)->combining_class;
}

}  // namespace

std::string ReplaceAll(std::string_view text, std::string_view pattern, std::string_view content) {
  std::string out;
  out.reserve(text.size());
  while (true) {
    const size_t at = text.find(pattern);
    out.append(text.substr(0, at));
    if (at == std::string_view::npos) return out;
    out.append(content);
    text.remove_prefix(at + pattern.size());
  }
}

std::string ToNfc(std::string_view text) {
  if (IsAscii(text)) return std::string(text);
  constexpr auto kDecompose = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  constexpr auto kCompose = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  std::vector<utf8proc_int32_t> code_points;
  code_points.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    // The longest canonical decomposition in Unicode has 4 code points.
    std::array<utf8proc_int32_t, 16> parts{};
    int boundary_class = 0;
    const utf8proc_ssize_t n =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(NextCodePoint(text, &pos)),
                                parts.data(), parts.size(), kDecompose, &boundary_class);
    WALSH_CHECK(n >= 0 && n <= static_cast<utf8proc_ssize_t>(parts.size()));
    code_points.insert(code_points.end(), parts.begin(), parts.begin() + n);
  }
  for (auto begin = code_points.begin(); begin != code_points.end();) {
    if (CombiningClass(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end =
        std::find_if(begin, code_points.end(), [](int32_t c) { return CombiningClass(c) == 0; });
    std::stable_sort(begin, end,
                     [](int32_t a, int32_t b) { return CombiningClass(a) < CombiningClass(b); });
    begin = end;
  }
  const utf8proc_ssize_t n = utf8proc_normalize_utf32(
      code_points.data(), static_cast<utf8proc_ssize_t>(code_points.size()), kCompose);
  WALSH_CHECK(n >= 0);
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < n; ++i) {
    AppendUtf8(static_cast<uint32_t>(code_points[static_cast<size_t>(i)]), out);
  }
  return out;
}

absl::StatusOr<std::string> Normalizer::Apply(std::string_view text) const {
  std::string out(text);
  if (out.empty()) return out;
  const size_t bytes_max = kGrowthMax * text.size() + kGrowthBytesMin;
  for (const NormalizerStep& step : steps) {
    switch (step.kind) {
      case NormalizerStep::Kind::kNfc:
        out = ToNfc(out);
        break;
      case NormalizerStep::Kind::kPrepend:
        out = absl::StrCat(step.content, out);
        break;
      case NormalizerStep::Kind::kReplace:
        out = ReplaceAll(out, step.pattern, step.content);
        break;
    }
    if (out.size() > bytes_max) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the normalizer makes ", out.size(), " bytes of ", text.size(), ", at most ", bytes_max));
    }
  }
  return out;
}

}  // namespace walsh
