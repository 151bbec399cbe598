#include "worker/interop/encode_floats.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/tensor/half.h"

namespace walsh::interop {

absl::StatusOr<std::vector<std::byte>> EncodeFloats(const std::string& tensor, StorageType type,
                                                    std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(Info(type).block_bytes));
  if (type == StorageType::kF32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  const bool is_half = type == StorageType::kF16;
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = is_half ? FloatToHalf(values[i]) : FloatToBf16(values[i]);
    if (!std::isfinite(is_half ? HalfToFloat(bits) : Bf16ToFloat(bits))) {
      return absl::FailedPreconditionError(absl::StrCat("tensor '", tensor, "' holds ", values[i],
                                                        ", which ", std::string(Info(type).name),
                                                        " cannot hold; F32 can"));
    }
    std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
  }
  return bytes;
}

}  // namespace walsh::interop
