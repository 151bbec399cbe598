// Infinities and NaNs among 16-bit floats, found by their bits: weights of gigabytes are looked
// through before they are written or used.
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace walsh {

// The index of the first value that is not finite; nullopt where all are.
std::optional<int64_t> FirstNotFiniteBf16(std::span<const uint16_t> values);
std::optional<int64_t> FirstNotFiniteHalf(std::span<const uint16_t> values);

}  // namespace walsh
