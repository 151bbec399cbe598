// PackedMatmul with AVX2: vpmaddubsw multiplies a step of 8 rows by 4 columns, in 16 bits.
//
// 16 bits hold a whole block's sum for codes up to 15: 8 steps of 2 · 15 · 127 make 30,480. Codes
// of 8 bits would saturate within one step (2 · 255 · 127), so their nibbles are multiplied apart.
#include <immintrin.h>

#include <cstring>

#include "worker/kernels/cpu/cpu_features.h"
#include "worker/kernels/cpu/packed_matmul.h"

#define WALSH_TARGET __attribute__((target("avx2,fma,f16c")))
#define WALSH_TARGET_INLINE WALSH_TARGET __attribute__((always_inline)) inline

namespace walsh::kernels::cpu {
namespace {

constexpr int64_t kHalfRows = 8;
constexpr int64_t kHalfBytes = kHalfRows * kStepCols;

WALSH_TARGET_INLINE __m256i Load(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// The codes of step `kStep` of 8 rows, one a byte; `block` points to the rows' half.
template <int kBits, int kStep>
WALSH_TARGET_INLINE __m256i UnpackStep(const uint8_t* block) {
  if constexpr (kBits == 8) {
    return Load(block + kStep * kVectorBytes);
  } else if constexpr (kBits == 4) {
    const __m256i v = Load(block + kStep / 2 * kVectorBytes);
    return _mm256_and_si256(kStep % 2 == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const __m256i v = Load(block + kStep / 4 * kVectorBytes);
    return _mm256_and_si256(_mm256_srli_epi16(v, 2 * (kStep % 4)), _mm256_set1_epi8(3));
  } else {
    static_assert(kBits == 3);
    const __m256i plane = Load(block + 2 * kVectorBytes);
    const __m256i high = kStep < 2 ? _mm256_slli_epi16(plane, 2 - kStep)
                                   : _mm256_srli_epi16(plane, kStep < 2 ? 0 : kStep - 2);
    return _mm256_or_si256(UnpackStep<2, kStep>(block),
                           _mm256_and_si256(high, _mm256_set1_epi8(4)));
  }
}

WALSH_TARGET_INLINE __m256i BroadcastStep(const int8_t* x) {
  int32_t step;
  __builtin_memcpy(&step, x, sizeof(step));
  return _mm256_set1_epi32(step);
}

// Sums of a block in 16 bits: `high` is of the upper nibbles and unused for codes up to 15.
struct Sums {
  __m256i low;
  __m256i high;
};

template <int kBits, bool kWide, int kTokens, int kStep>
WALSH_TARGET_INLINE void MultiplySteps(const uint8_t* block, const int8_t* x, int64_t x_stride,
                                       Sums (&sums)[kTokens]) {
  if constexpr (kStep < kBlockSteps) {
    const __m256i codes = UnpackStep<kBits, kStep>(block);
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256i step = BroadcastStep(x + t * x_stride + kStep * kStepCols);
      if constexpr (kWide) {
        const __m256i low = _mm256_and_si256(codes, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
        sums[t].low = _mm256_add_epi16(sums[t].low, _mm256_maddubs_epi16(low, step));
        sums[t].high = _mm256_add_epi16(sums[t].high, _mm256_maddubs_epi16(high, step));
      } else {
        sums[t].low = _mm256_add_epi16(sums[t].low, _mm256_maddubs_epi16(codes, step));
      }
    }
    MultiplySteps<kBits, kWide, kTokens, kStep + 1>(block, x, x_stride, sums);
  }
}

WALSH_TARGET_INLINE __m256 LoadHalves(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

WALSH_TARGET_INLINE __m256 LoadZeros(const PackedTile& tile, int64_t at) {
  if (tile.float_zeros != nullptr) return LoadHalves(tile.float_zeros + at);
  if (tile.zeros == nullptr) return _mm256_set1_ps(tile.uniform_zero);
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.zeros + at))));
}

// Adds the bias to a token's rows half · 8 … and stores those that the tile has.
WALSH_TARGET_INLINE void StoreRows(const PackedTile& tile, int64_t half, int64_t token, __m256 sum,
                                   float factor) {
  const int64_t n_rows = std::min(kHalfRows, tile.n_rows - half * kHalfRows);
  const size_t n_bytes = static_cast<size_t>(n_rows) * sizeof(float);
  alignas(32) float bias[kHalfRows] = {};
  if (tile.bias != nullptr) std::memcpy(bias, tile.bias + half * kHalfRows, n_bytes);
  alignas(32) float y[kHalfRows];
  _mm256_store_ps(y, _mm256_fmadd_ps(sum, _mm256_set1_ps(factor), _mm256_load_ps(bias)));
  std::memcpy(tile.y + token * tile.y_stride + half * kHalfRows, y, n_bytes);
}

// Rows half · 8 … of kTokens tokens from `first` on. kWide: codes may exceed 15.
template <int kBits, bool kWide, int kTokens>
WALSH_TARGET void MultiplyTokens(const PackedTile& tile, int64_t half, int64_t first) {
  const int64_t x_stride = tile.x.n_blocks * kBlockCols;
  const int8_t* x = tile.x.codes + first * x_stride;
  const float* x_scales = tile.x.scales + first * tile.x.n_blocks;
  const float* group_sums = tile.x.group_sums + first * tile.n_groups;
  const uint8_t* codes = tile.codes + half * kHalfBytes;
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i sixteens = _mm256_set1_epi16(16);
  __m256 sum[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_ps();
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    __m256 group_sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) group_sum[t] = _mm256_setzero_ps();
    for (int64_t block = 0; block < tile.blocks_per_group; ++block) {
      Sums sums[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[t].low = sums[t].high = _mm256_setzero_si256();
      MultiplySteps<kBits, kWide, kTokens, 0>(codes, x, x_stride, sums);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        __m256i dot = _mm256_madd_epi16(sums[t].low, ones);
        if constexpr (kWide) {
          dot = _mm256_add_epi32(dot, _mm256_madd_epi16(sums[t].high, sixteens));
        }
        group_sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot),
                                       _mm256_set1_ps(x_scales[t * tile.x.n_blocks]), group_sum[t]);
      }
      codes += BlockBytes(kBits);
      x += kBlockCols;
      ++x_scales;
    }
    const int64_t at = group * kTileRows + half * kHalfRows;
    const __m256 scales =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.scales + at)));
    const __m256 zeros = LoadZeros(tile, at);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256 correction = _mm256_set1_ps(group_sums[t * tile.n_groups + group]);
      sum[t] = _mm256_fmadd_ps(scales, _mm256_fnmadd_ps(zeros, correction, group_sum[t]), sum[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) StoreRows(tile, half, first + t, sum[t], tile.factor);
}

// Sums over the activations whose codes have the low bit, the high bit, both: of a block in 16
// bits, of a group in floats.
struct BitDots {
  __m256i low, high, both;
};
struct BitSums {
  __m256 low, high, both;
};

template <int kBits, int kTokens, int kStep = 0>
WALSH_TARGET_INLINE void MultiplyLevelSteps(const uint8_t* block, const int8_t* x, int64_t x_stride,
                                            BitDots (&dots)[kTokens]) {
  if constexpr (kStep < kBlockSteps) {
    const __m256i ones = _mm256_set1_epi8(1);
    const __m256i codes = UnpackStep<kBits, kStep>(block);
    const __m256i low = _mm256_and_si256(codes, ones);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 1), ones);
    const __m256i both = _mm256_and_si256(low, high);
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      const __m256i step = BroadcastStep(x + t * x_stride + kStep * kStepCols);
      dots[t].low = _mm256_add_epi16(dots[t].low, _mm256_maddubs_epi16(low, step));
      dots[t].high = _mm256_add_epi16(dots[t].high, _mm256_maddubs_epi16(high, step));
      dots[t].both = _mm256_add_epi16(dots[t].both, _mm256_maddubs_epi16(both, step));
    }
    MultiplyLevelSteps<kBits, kTokens, kStep + 1>(block, x, x_stride, dots);
  }
}

// The same with a codebook.
template <int kBits, int kTokens>
WALSH_TARGET void MultiplyLevelTokens(const PackedTile& tile, int64_t half, int64_t first) {
  const int64_t x_stride = tile.x.n_blocks * kBlockCols;
  const int8_t* x = tile.x.codes + first * x_stride;
  const float* x_scales = tile.x.scales + first * tile.x.n_blocks;
  const float* group_sums = tile.x.group_sums + first * tile.n_groups;
  const uint8_t* codes = tile.codes + half * kHalfBytes;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[kTokens];
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_ps();
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    BitSums sums[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      sums[t].low = sums[t].high = sums[t].both = _mm256_setzero_ps();
    }
    for (int64_t block = 0; block < tile.blocks_per_group; ++block) {
      BitDots dots[kTokens];
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        dots[t].low = dots[t].high = dots[t].both = _mm256_setzero_si256();
      }
      MultiplyLevelSteps<kBits, kTokens>(codes, x, x_stride, dots);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const __m256 scale = _mm256_set1_ps(x_scales[t * tile.x.n_blocks]);
        sums[t].low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(dots[t].low, ones)),
                                      scale, sums[t].low);
        sums[t].high = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(dots[t].high, ones)),
                                       scale, sums[t].high);
        sums[t].both = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(dots[t].both, ones)),
                                       scale, sums[t].both);
      }
      codes += BlockBytes(kBits);
      x += kBlockCols;
      ++x_scales;
    }
    const uint16_t* levels = tile.levels + group * kCodebookLevels * kTileRows + half * kHalfRows;
    const __m256 l0 = LoadHalves(levels);
    const __m256 low = _mm256_sub_ps(LoadHalves(levels + kTileRows), l0);
    const __m256 high = _mm256_sub_ps(LoadHalves(levels + 2 * kTileRows), l0);
    const __m256 both = _mm256_sub_ps(
        _mm256_sub_ps(_mm256_sub_ps(LoadHalves(levels + 3 * kTileRows), l0), low), high);
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = _mm256_fmadd_ps(l0, _mm256_set1_ps(group_sums[t * tile.n_groups + group]), sum[t]);
      sum[t] = _mm256_fmadd_ps(low, sums[t].low, sum[t]);
      sum[t] = _mm256_fmadd_ps(high, sums[t].high, sum[t]);
      sum[t] = _mm256_fmadd_ps(both, sums[t].both, sum[t]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) StoreRows(tile, half, first + t, sum[t], 1.0f);
}

template <int kBits>
void MultiplyLevelBits(const PackedTile& tile) {
  const int64_t n = tile.x.n_tokens;
  for (int64_t half = 0; half * kHalfRows < tile.n_rows; ++half) {
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) MultiplyLevelTokens<kBits, 2>(tile, half, t);
    if (t < n) MultiplyLevelTokens<kBits, 1>(tile, half, t);
  }
}

void MultiplyLevels(const PackedTile& tile, bool expanded) {
  if (expanded) return MultiplyLevelBits<8>(tile);
  return MultiplyLevelBits<2>(tile);
}

template <int kBits, bool kWide>
void MultiplyBits(const PackedTile& tile) {
  const int64_t n = tile.x.n_tokens;
  for (int64_t half = 0; half * kHalfRows < tile.n_rows; ++half) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) MultiplyTokens<kBits, kWide, 4>(tile, half, t);
    if (n - t >= 2) {
      MultiplyTokens<kBits, kWide, 2>(tile, half, t);
      t += 2;
    }
    if (t < n) MultiplyTokens<kBits, kWide, 1>(tile, half, t);
  }
}

void Multiply(const PackedTile& tile, int bits, bool expanded) {
  if (bits == 8) return MultiplyBits<8, true>(tile);
  if (expanded) return MultiplyBits<8, false>(tile);
  if (bits == 4) return MultiplyBits<4, false>(tile);
  if (bits == 3) return MultiplyBits<3, false>(tile);
  return MultiplyBits<2, false>(tile);
}

template <int kBits, int kStep = 0>
WALSH_TARGET_INLINE void ExpandSteps(const uint8_t* half, uint8_t* bytes) {
  if constexpr (kStep < kBlockSteps) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + kStep * kVectorBytes),
                       UnpackStep<kBits, kStep>(half));
    ExpandSteps<kBits, kStep + 1>(half, bytes);
  }
}

template <int kBits>
WALSH_TARGET void ExpandBits(const uint8_t* codes, int64_t n_blocks, uint8_t* bytes) {
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t half = 0; half < 2; ++half) {
      ExpandSteps<kBits>(codes + block * BlockBytes(kBits) + half * kHalfBytes,
                         bytes + block * BlockBytes(8) + half * kHalfBytes);
    }
  }
}

void Expand(const uint8_t* codes, int bits, int64_t n_blocks, uint8_t* bytes) {
  switch (bits) {
    case 2:
      return ExpandBits<2>(codes, n_blocks, bytes);
    case 3:
      return ExpandBits<3>(codes, n_blocks, bytes);
    case 4:
      return ExpandBits<4>(codes, n_blocks, bytes);
    default:
      return ExpandBits<8>(codes, n_blocks, bytes);
  }
}

}  // namespace

PackedKernel Avx2PackedKernel() {
  return {.multiply = Multiply,
          .multiply_levels = MultiplyLevels,
          .expand = Expand,
          .expand_tokens_min = 9,
          .name = "AVX2"};
}

}  // namespace walsh::kernels::cpu
