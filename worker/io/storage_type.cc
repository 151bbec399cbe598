#include "worker/io/storage_type.h"

#include <array>
#include <bit>
#include <cstring>

#include "common/check.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

static_assert(std::endian::native == std::endian::little,
              "checkpoints are little-endian and are read without swapping");

constexpr int64_t kSuperBlock = 256;  // elements of a K format's block

constexpr std::array<StorageTypeInfo, 13> kInfos = {{
    {"F32", 0, 1, 4},
    {"F16", 1, 1, 2},
    {"BF16", 30, 1, 2},
    {"Q4_0", 2, 32, 2 + 16},
    {"Q4_1", 3, 32, 4 + 16},
    {"Q5_0", 6, 32, 2 + 4 + 16},
    {"Q5_1", 7, 32, 4 + 4 + 16},
    {"Q8_0", 8, 32, 2 + 32},
    {"Q2_K", 10, kSuperBlock, 16 + 64 + 4},
    {"Q3_K", 11, kSuperBlock, 32 + 64 + 12 + 2},
    {"Q4_K", 12, kSuperBlock, 4 + 12 + 128},
    {"Q5_K", 13, kSuperBlock, 4 + 12 + 32 + 128},
    {"Q6_K", 14, kSuperBlock, 128 + 64 + 16 + 2},
}};

// Names by number, for messages about types that walsh does not read.
constexpr std::string_view kGgmlNames[] = {
    "F32",     "F16",   "Q4_0",   "Q4_1",  "Q4_2",     "Q4_3",     "Q5_0",     "Q5_1",    "Q8_0",
    "Q8_1",    "Q2_K",  "Q3_K",   "Q4_K",  "Q5_K",     "Q6_K",     "Q8_K",     "IQ2_XXS", "IQ2_XS",
    "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S",    "IQ4_XS",   "I8",       "I16",     "I32",
    "I64",     "F64",   "IQ1_M",  "BF16",  "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",   "TQ2_0"};

using Bytes = const uint8_t*;

uint16_t Load16(Bytes p) {
  uint16_t value = 0;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

uint32_t Load32(Bytes p) {
  uint32_t value = 0;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

float LoadHalf(Bytes p) { return HalfToFloat(Load16(p)); }

// In the 32-element formats the low nibbles hold elements 0 to 15, the high ones 16 to 31; in the
// five-bit ones bit i of `high` is the fifth bit of element i.
float Nibble(Bytes q, int i) { return static_cast<float>(i < 16 ? q[i] & 0xf : q[i - 16] >> 4); }
float FiveBits(Bytes q, uint32_t high, int i) {
  return Nibble(q, i) + static_cast<float>(((high >> i) & 1u) << 4);
}

void BlockQ4_0(Bytes p, float* y) {
  const float d = LoadHalf(p);
  for (int i = 0; i < 32; ++i) y[i] = d * (Nibble(p + 2, i) - 8.0f);
}

void BlockQ4_1(Bytes p, float* y) {
  const float d = LoadHalf(p);
  const float m = LoadHalf(p + 2);
  for (int i = 0; i < 32; ++i) y[i] = d * Nibble(p + 4, i) + m;
}

void BlockQ5_0(Bytes p, float* y) {
  const float d = LoadHalf(p);
  const uint32_t high = Load32(p + 2);
  for (int i = 0; i < 32; ++i) y[i] = d * (FiveBits(p + 6, high, i) - 16.0f);
}

void BlockQ5_1(Bytes p, float* y) {
  const float d = LoadHalf(p);
  const float m = LoadHalf(p + 2);
  const uint32_t high = Load32(p + 4);
  for (int i = 0; i < 32; ++i) y[i] = d * FiveBits(p + 8, high, i) + m;
}

void BlockQ8_0(Bytes p, float* y) {
  const float d = LoadHalf(p);
  for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(static_cast<int8_t>(p[2 + i]));
}

// 16 groups of 16: four-bit scale and minimum each, over one d and dmin.
void BlockQ2_K(Bytes p, float* y) {
  const Bytes scales = p;
  const Bytes q = p + 16;
  const float d = LoadHalf(p + 80);
  const float dmin = LoadHalf(p + 82);
  for (int i = 0; i < kSuperBlock; ++i) {
    // Each 32 bytes carry 128 elements: bit pair s of byte b is element 32·s + b.
    const int half = i / 128;
    const int shift = 2 * ((i % 128) / 32);
    const int code = (q[32 * half + i % 32] >> shift) & 3;
    const uint8_t scale = scales[i / 16];
    const float dl = d * static_cast<float>(scale & 0xf);
    const float ml = dmin * static_cast<float>(scale >> 4);
    y[i] = dl * static_cast<float>(code) - ml;
  }
}

// 16 groups of 16 with signed six-bit scales: low nibbles in bytes 0 to 7, high bit pairs in 8
// to 11.
int ScaleQ3_K(Bytes scales, int group) {
  const int low = group < 8 ? scales[group] & 0xf : scales[group - 8] >> 4;
  const int high = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
  return (low | (high << 4)) - 32;
}

void BlockQ3_K(Bytes p, float* y) {
  const Bytes hmask = p;
  const Bytes q = p + 32;
  const Bytes scales = p + 96;
  const float d = LoadHalf(p + 108);
  for (int i = 0; i < kSuperBlock; ++i) {
    const int half = i / 128;
    const int quarter = (i % 128) / 32;
    const int low = (q[32 * half + i % 32] >> (2 * quarter)) & 3;
    // A set bit of the mask means that nothing is subtracted.
    const int is_high = (hmask[i % 32] >> (4 * half + quarter)) & 1;
    const int code = low - (is_high != 0 ? 0 : 4);
    const float dl = d * static_cast<float>(ScaleQ3_K(scales, i / 16));
    y[i] = dl * static_cast<float>(code);
  }
}

struct ScaleAndMin {
  int scale = 0;
  int min = 0;
};

// Eight groups of 32 with six-bit scale and minimum, packed in 12 bytes (get_scale_min_k4).
ScaleAndMin ScaleQ4_K(Bytes s, int group) {
  if (group < 4) return {.scale = s[group] & 63, .min = s[group + 4] & 63};
  return {.scale = (s[group + 4] & 0xf) | ((s[group - 4] >> 6) << 4),
          .min = (s[group + 4] >> 4) | ((s[group] >> 6) << 4)};
}

// Each 32 bytes carry two groups: the low nibbles the even one, the high nibbles the odd one.
int NibbleK(Bytes q, int i) {
  const uint8_t byte = q[32 * (i / 64) + i % 32];
  return (i / 32) % 2 == 0 ? byte & 0xf : byte >> 4;
}

void BlockQ4_K(Bytes p, float* y) {
  const float d = LoadHalf(p);
  const float dmin = LoadHalf(p + 2);
  const Bytes scales = p + 4;
  const Bytes q = p + 16;
  for (int group = 0; group < 8; ++group) {
    const ScaleAndMin s = ScaleQ4_K(scales, group);
    const float dl = d * static_cast<float>(s.scale);
    const float ml = dmin * static_cast<float>(s.min);
    for (int i = 32 * group; i < 32 * (group + 1); ++i) {
      y[i] = dl * static_cast<float>(NibbleK(q, i)) - ml;
    }
  }
}

void BlockQ5_K(Bytes p, float* y) {
  const float d = LoadHalf(p);
  const float dmin = LoadHalf(p + 2);
  const Bytes scales = p + 4;
  const Bytes high = p + 16;
  const Bytes q = p + 48;
  for (int group = 0; group < 8; ++group) {
    const ScaleAndMin s = ScaleQ4_K(scales, group);
    const float dl = d * static_cast<float>(s.scale);
    const float ml = dmin * static_cast<float>(s.min);
    for (int i = 32 * group; i < 32 * (group + 1); ++i) {
      const int code = NibbleK(q, i) | (((high[i % 32] >> group) & 1) << 4);
      y[i] = dl * static_cast<float>(code) - ml;
    }
  }
}

// 16 groups of 16 with signed eight-bit scales.
void BlockQ6_K(Bytes p, float* y) {
  const Bytes low = p;
  const Bytes high = p + 128;
  const Bytes scales = p + 192;
  const float d = LoadHalf(p + 208);
  for (int i = 0; i < kSuperBlock; ++i) {
    // Each half: 64 bytes of nibbles (elements 0 to 63 low, 64 to 127 high), 32 bytes of bit pairs.
    const int half = i / 128;
    const int k = i % 128;
    const uint8_t nibbles = low[64 * half + k % 64];
    const int four = k < 64 ? nibbles & 0xf : nibbles >> 4;
    const int two = (high[32 * half + k % 32] >> (2 * (k / 32))) & 3;
    const int code = (four | (two << 4)) - 32;
    const float dl = d * static_cast<float>(static_cast<int8_t>(scales[i / 16]));
    y[i] = dl * static_cast<float>(code);
  }
}

template <typename Block>
void ForEachBlock(const StorageTypeInfo& info, Bytes stored, std::span<float> values, Block block) {
  const auto n_blocks = static_cast<int64_t>(values.size()) / info.block_elements;
  for (int64_t b = 0; b < n_blocks; ++b) {
    block(stored + b * info.block_bytes, values.data() + b * info.block_elements);
  }
}

}  // namespace

const StorageTypeInfo& Info(StorageType type) { return kInfos[static_cast<size_t>(type)]; }

std::optional<StorageType> StorageTypeFromGgml(uint32_t ggml_id) {
  for (size_t i = 0; i < kInfos.size(); ++i) {
    if (kInfos[i].ggml_id == ggml_id) return static_cast<StorageType>(i);
  }
  return std::nullopt;
}

std::string_view GgmlTypeName(uint32_t ggml_id) {
  return ggml_id < std::size(kGgmlNames) ? kGgmlNames[ggml_id] : "unknown";
}

void Dequantize(StorageType type, std::span<const std::byte> stored, std::span<float> values) {
  const StorageTypeInfo& info = Info(type);
  const auto n_values = static_cast<int64_t>(values.size());
  WALSH_CHECK_EQ(n_values % info.block_elements, 0);
  WALSH_CHECK_EQ(static_cast<int64_t>(stored.size()),
                 n_values / info.block_elements * info.block_bytes);
  const auto* p = reinterpret_cast<const uint8_t*>(stored.data());
  switch (type) {
    case StorageType::kF32:
      // An empty span may carry a null pointer, which memcpy must not see.
      if (!values.empty()) std::memcpy(values.data(), p, stored.size());
      return;
    case StorageType::kF16:
      return ForEachBlock(info, p, values, [](Bytes b, float* y) { *y = LoadHalf(b); });
    case StorageType::kBf16:
      return ForEachBlock(info, p, values, [](Bytes b, float* y) { *y = Bf16ToFloat(Load16(b)); });
    case StorageType::kQ4_0:
      return ForEachBlock(info, p, values, BlockQ4_0);
    case StorageType::kQ4_1:
      return ForEachBlock(info, p, values, BlockQ4_1);
    case StorageType::kQ5_0:
      return ForEachBlock(info, p, values, BlockQ5_0);
    case StorageType::kQ5_1:
      return ForEachBlock(info, p, values, BlockQ5_1);
    case StorageType::kQ8_0:
      return ForEachBlock(info, p, values, BlockQ8_0);
    case StorageType::kQ2_K:
      return ForEachBlock(info, p, values, BlockQ2_K);
    case StorageType::kQ3_K:
      return ForEachBlock(info, p, values, BlockQ3_K);
    case StorageType::kQ4_K:
      return ForEachBlock(info, p, values, BlockQ4_K);
    case StorageType::kQ5_K:
      return ForEachBlock(info, p, values, BlockQ5_K);
    case StorageType::kQ6_K:
      return ForEachBlock(info, p, values, BlockQ6_K);
  }
}

}  // namespace walsh
