#include "worker/io/not_finite.h"

#include <algorithm>
#include <cstddef>

namespace walsh {
namespace {

// All bits of the exponent: set together only in infinities and NaNs.
constexpr uint16_t kBf16Exponent = 0x7f80;
constexpr uint16_t kHalfExponent = 0x7c00;

template <uint16_t kExponent>
bool IsNotFinite(uint16_t value) {
  return (value & kExponent) == kExponent;
}

template <uint16_t kExponent>
std::optional<int64_t> FirstNotFinite(std::span<const uint16_t> values) {
  // Counted by stretches, without a branch for each value: the compiler vectorizes that.
  constexpr size_t kStretch = 4096;
  const auto count = [](std::span<const uint16_t> stretch) {
    uint16_t n = 0;
    for (const uint16_t value : stretch) {
      n = static_cast<uint16_t>(n + (IsNotFinite<kExponent>(value) ? 1 : 0));
    }
    return n;
  };
  for (size_t first = 0; first < values.size(); first += kStretch) {
    const auto stretch = values.subspan(first, std::min(kStretch, values.size() - first));
    if (count(stretch) == 0) continue;
    const auto bad = std::find_if(stretch.begin(), stretch.end(), IsNotFinite<kExponent>);
    return static_cast<int64_t>(first) + (bad - stretch.begin());
  }
  return std::nullopt;
}

}  // namespace

std::optional<int64_t> FirstNotFiniteBf16(std::span<const uint16_t> values) {
  return FirstNotFinite<kBf16Exponent>(values);
}

std::optional<int64_t> FirstNotFiniteHalf(std::span<const uint16_t> values) {
  return FirstNotFinite<kHalfExponent>(values);
}

}  // namespace walsh
