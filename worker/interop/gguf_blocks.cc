#include "worker/interop/gguf_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/tensor/half.h"

namespace walsh::interop {
namespace {

constexpr int64_t kBlock = 32;
constexpr int kQ4Middle = 8;

// −d · zero: exact in float32, since the factors have 11 and 4 significant bits.
float Minimum(float scale, uint8_t zero) { return -scale * static_cast<float>(zero); }

bool IsHalf(float value) {
  const float rounded = HalfToFloat(FloatToHalf(value));
  return std::isfinite(rounded) && rounded == value;
}

absl::StatusOr<StorageType> FourBitType(const QuantizedMatrix& m) {
  const bool is_centered =
      std::all_of(m.zeros.begin(), m.zeros.end(), [](uint8_t zero) { return zero == kQ4Middle; });
  if (is_centered) return StorageType::kQ4_0;
  for (size_t i = 0; i < m.zeros.size(); ++i) {
    if (IsHalf(Minimum(m.scales[i], m.zeros[i]))) continue;
    const auto index = static_cast<int64_t>(i);
    return absl::FailedPreconditionError(absl::StrCat(
        "Q4_1 stores a group's smallest weight in half precision, which does not hold -",
        m.scales[i], " x ", static_cast<int>(m.zeros[i]), " (output ", index / m.groups(),
        ", group ", index % m.groups(), "); symmetric 4-bit artifacts always fit"));
  }
  return StorageType::kQ4_1;
}

absl::StatusOr<StorageType> EightBitType(const QuantizedMatrix& m) {
  for (int64_t row = 0; row < m.rows; ++row) {
    for (int64_t col = 0; col < m.cols; ++col) {
      const int code = m.codes[static_cast<size_t>(row * m.cols + col)];
      const int zero = m.zeros[static_cast<size_t>(row * m.groups() + col / m.group_size)];
      if (code - zero >= -128 && code - zero <= 127) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("Q8_0 holds -128 to 127 steps, the weight at output ", row, ", input ", col,
                       " is ", code - zero, "; symmetric 8-bit artifacts always fit"));
    }
  }
  return StorageType::kQ8_0;
}

void PutHalf(float value, std::byte* to) {
  const uint16_t bits = FloatToHalf(value);
  std::memcpy(to, &bits, sizeof(bits));
}

// Low nibbles hold weights 0 to 15, high ones 16 to 31.
void PutNibbles(const uint8_t* codes, std::byte* to) {
  for (int i = 0; i < kBlock / 2; ++i) {
    to[i] = static_cast<std::byte>(codes[i] | (codes[i + kBlock / 2] << 4));
  }
}

}  // namespace

absl::StatusOr<StorageType> GgufTypeOf(const QuantizedMatrix& matrix) {
  if (matrix.bits != 4 && matrix.bits != 8) {
    return absl::FailedPreconditionError(
        absl::StrCat(matrix.bits,
                     " bits: no type of ggml holds such weights exactly, only 4 and 8 "
                     "bits can be exported"));
  }
  if (matrix.group_size % kBlock != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "groups of ", matrix.group_size, " inputs are no multiple of ggml's blocks of ", kBlock));
  }
  return matrix.bits == 4 ? FourBitType(matrix) : EightBitType(matrix);
}

void EncodeGgufRow(const QuantizedMatrix& matrix, StorageType type, int64_t row,
                   std::vector<std::byte>& bytes) {
  const int64_t block_bytes = Info(type).block_bytes;
  bytes.resize(static_cast<size_t>(matrix.cols / kBlock * block_bytes));
  std::byte* to = bytes.data();
  for (int64_t col = 0; col < matrix.cols; col += kBlock, to += block_bytes) {
    const auto group = static_cast<size_t>(row * matrix.groups() + col / matrix.group_size);
    const uint8_t* codes = matrix.codes.data() + row * matrix.cols + col;
    PutHalf(matrix.scales[group], to);
    switch (type) {
      case StorageType::kQ4_0:
        PutNibbles(codes, to + 2);
        break;
      case StorageType::kQ4_1:
        PutHalf(Minimum(matrix.scales[group], matrix.zeros[group]), to + 2);
        PutNibbles(codes, to + 4);
        break;
      default:  // Q8_0
        for (int64_t i = 0; i < kBlock; ++i) {
          to[2 + i] = static_cast<std::byte>(codes[i] - matrix.zeros[group]);
        }
    }
  }
}

}  // namespace walsh::interop
