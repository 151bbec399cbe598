// PackedMatmul with AVX-512 VNNI: vpdpbusd multiplies a step of 16 rows by 4 columns at once.
//
// Bound: at one token the bytes of the packed weights; unpacking a block of 512 weights takes about
// 1 instruction for 20 weights.
#include <immintrin.h>

#include "worker/kernels/cpu/cpu_features.h"
#include "worker/kernels/cpu/packed_matmul.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers leave the unused source of masked intrinsics undefined (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define WALSH_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define WALSH_TARGET_INLINE WALSH_TARGET __attribute__((always_inline)) inline

namespace walsh::kernels::cpu {
namespace {

// The codes of step `kStep` of a block, one a byte.
template <int kBits, int kStep>
WALSH_TARGET_INLINE __m512i UnpackStep(const uint8_t* block) {
  if constexpr (kBits == 8) {
    return _mm512_load_si512(block + kStep * kVectorBytes);
  } else if constexpr (kBits == 4) {
    const __m512i v = _mm512_load_si512(block + kStep / 2 * kVectorBytes);
    return _mm512_and_si512(kStep % 2 == 0 ? v : _mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const __m512i v = _mm512_load_si512(block + kStep / 4 * kVectorBytes);
    return _mm512_and_si512(_mm512_srli_epi16(v, 2 * (kStep % 4)), _mm512_set1_epi8(3));
  } else {
    static_assert(kBits == 3);
    const __m512i low =
        _mm512_srli_epi16(_mm512_load_si512(block + kStep / 4 * kVectorBytes), 2 * (kStep % 4));
    const __m512i plane = _mm512_load_si512(block + 2 * kVectorBytes);
    const __m512i high = kStep < 2 ? _mm512_slli_epi16(plane, 2 - kStep)
                                   : _mm512_srli_epi16(plane, kStep < 2 ? 0 : kStep - 2);
    // Bits 0 and 1 from `low`, bit 2 from `high`: select by a mask, then drop the rest.
    constexpr int kSelect = 0xca;  // a ? b : c
    return _mm512_and_si512(_mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, high, kSelect),
                            _mm512_set1_epi8(7));
  }
}

WALSH_TARGET_INLINE __m512i BroadcastStep(const int8_t* x) {
  int32_t step;
  __builtin_memcpy(&step, x, sizeof(step));
  return _mm512_set1_epi32(step);
}

template <int kBits, int kTokens, int kStep>
WALSH_TARGET_INLINE void MultiplyStep(const uint8_t* block, const int8_t* x, int64_t x_stride,
                                      __m512i (&dot)[kTokens]) {
  const __m512i codes = UnpackStep<kBits, kStep>(block);
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    dot[t] =
        _mm512_dpbusd_epi32(dot[t], codes, BroadcastStep(x + t * x_stride + kStep * kStepCols));
  }
}

template <int kBits, int kTokens>
WALSH_TARGET_INLINE void MultiplyBlock(const uint8_t* block, const int8_t* x, int64_t x_stride,
                                       __m512i (&dot)[kTokens]) {
  MultiplyStep<kBits, kTokens, 0>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 1>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 2>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 3>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 4>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 5>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 6>(block, x, x_stride, dot);
  MultiplyStep<kBits, kTokens, 7>(block, x, x_stride, dot);
}

WALSH_TARGET_INLINE __m512 LoadHalves(const uint16_t* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

WALSH_TARGET_INLINE __m512 LoadZeros(const PackedTile& tile, int64_t at) {
  if (tile.float_zeros != nullptr) return LoadHalves(tile.float_zeros + at);
  if (tile.zeros == nullptr) return _mm512_set1_ps(tile.uniform_zero);
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.zeros + at))));
}

// kTokens tokens from `first` on.
template <int kBits, int kTokens>
WALSH_TARGET void MultiplyTokens(const PackedTile& tile, int64_t first) {
  const int64_t x_stride = tile.x.n_blocks * kBlockCols;
  const int8_t* x = tile.x.codes + first * x_stride;
  const float* x_scales = tile.x.scales + first * tile.x.n_blocks;
  const float* group_sums = tile.x.group_sums + first * tile.n_groups;
  const uint8_t* codes = tile.codes;
  __m512 sum[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_setzero_ps();
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    __m512 group_sum[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) group_sum[t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < tile.blocks_per_group; ++block) {
      __m512i dot[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) dot[t] = _mm512_setzero_si512();
      MultiplyBlock<kBits, kTokens>(codes, x, x_stride, dot);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        group_sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]),
                                       _mm512_set1_ps(x_scales[t * tile.x.n_blocks]), group_sum[t]);
      }
      codes += BlockBytes(kBits);
      x += kBlockCols;
      ++x_scales;
    }
    const int64_t at = group * kTileRows;
    const __m512 scales =
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.scales + at)));
    const __m512 zeros = LoadZeros(tile, at);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512 correction = _mm512_set1_ps(group_sums[t * tile.n_groups + group]);
      sum[t] = _mm512_fmadd_ps(scales, _mm512_fnmadd_ps(zeros, correction, group_sum[t]), sum[t]);
    }
  }
  const auto valid = static_cast<__mmask16>((1u << tile.n_rows) - 1);
  const __m512 bias =
      tile.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, tile.bias);
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    _mm512_mask_storeu_ps(tile.y + (first + t) * tile.y_stride, valid,
                          _mm512_fmadd_ps(sum[t], _mm512_set1_ps(tile.factor), bias));
  }
}

// Sums over the activations whose codes have the low bit, the high bit, both.
struct BitDots {
  __m512i low, high, both;
};
struct BitSums {
  __m512 low, high, both;
};

template <int kBits, int kTokens, int kStep = 0>
WALSH_TARGET_INLINE void MultiplyLevelSteps(const uint8_t* block, const int8_t* x, int64_t x_stride,
                                            BitDots (&dots)[kTokens]) {
  if constexpr (kStep < kBlockSteps) {
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i codes = UnpackStep<kBits, kStep>(block);
    const __m512i low = _mm512_and_si512(codes, ones);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 1), ones);
    const __m512i both = _mm512_and_si512(low, high);
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      const __m512i step = BroadcastStep(x + t * x_stride + kStep * kStepCols);
      dots[t].low = _mm512_dpbusd_epi32(dots[t].low, low, step);
      dots[t].high = _mm512_dpbusd_epi32(dots[t].high, high, step);
      dots[t].both = _mm512_dpbusd_epi32(dots[t].both, both, step);
    }
    MultiplyLevelSteps<kBits, kTokens, kStep + 1>(block, x, x_stride, dots);
  }
}

// The same with a codebook.
template <int kBits, int kTokens>
WALSH_TARGET void MultiplyLevelTokens(const PackedTile& tile, int64_t first) {
  const int64_t x_stride = tile.x.n_blocks * kBlockCols;
  const int8_t* x = tile.x.codes + first * x_stride;
  const float* x_scales = tile.x.scales + first * tile.x.n_blocks;
  const float* group_sums = tile.x.group_sums + first * tile.n_groups;
  const uint8_t* codes = tile.codes;
  __m512 sum[kTokens];
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) sum[t] = _mm512_setzero_ps();
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    BitSums sums[kTokens];
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      sums[t].low = sums[t].high = sums[t].both = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < tile.blocks_per_group; ++block) {
      BitDots dots[kTokens];
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        dots[t].low = dots[t].high = dots[t].both = _mm512_setzero_si512();
      }
      MultiplyLevelSteps<kBits, kTokens>(codes, x, x_stride, dots);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const __m512 scale = _mm512_set1_ps(x_scales[t * tile.x.n_blocks]);
        sums[t].low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t].low), scale, sums[t].low);
        sums[t].high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t].high), scale, sums[t].high);
        sums[t].both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t].both), scale, sums[t].both);
      }
      codes += BlockBytes(kBits);
      x += kBlockCols;
      ++x_scales;
    }
    const uint16_t* levels = tile.levels + group * kCodebookLevels * kTileRows;
    const __m512 l0 = LoadHalves(levels);
    const __m512 low = _mm512_sub_ps(LoadHalves(levels + kTileRows), l0);
    const __m512 high = _mm512_sub_ps(LoadHalves(levels + 2 * kTileRows), l0);
    const __m512 both = _mm512_sub_ps(
        _mm512_sub_ps(_mm512_sub_ps(LoadHalves(levels + 3 * kTileRows), l0), low), high);
#pragma GCC unroll 2
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = _mm512_fmadd_ps(l0, _mm512_set1_ps(group_sums[t * tile.n_groups + group]), sum[t]);
      sum[t] = _mm512_fmadd_ps(low, sums[t].low, sum[t]);
      sum[t] = _mm512_fmadd_ps(high, sums[t].high, sum[t]);
      sum[t] = _mm512_fmadd_ps(both, sums[t].both, sum[t]);
    }
  }
  const auto valid = static_cast<__mmask16>((1u << tile.n_rows) - 1);
  const __m512 bias =
      tile.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid, tile.bias);
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
    _mm512_mask_storeu_ps(tile.y + (first + t) * tile.y_stride, valid, _mm512_add_ps(sum[t], bias));
  }
}

template <int kBits>
void MultiplyLevelBits(const PackedTile& tile) {
  const int64_t n = tile.x.n_tokens;
  int64_t t = 0;
  for (; t + 2 <= n; t += 2) MultiplyLevelTokens<kBits, 2>(tile, t);
  if (t < n) MultiplyLevelTokens<kBits, 1>(tile, t);
}

void MultiplyLevels(const PackedTile& tile, bool expanded) {
  if (expanded) return MultiplyLevelBits<8>(tile);
  return MultiplyLevelBits<2>(tile);
}

template <int kBits>
void MultiplyBits(const PackedTile& tile) {
  const int64_t n = tile.x.n_tokens;
  int64_t t = 0;
  if constexpr (kBits == 8) {
    for (; t + 8 <= n; t += 8) MultiplyTokens<kBits, 8>(tile, t);
  }
  for (; t + 4 <= n; t += 4) MultiplyTokens<kBits, 4>(tile, t);
  if (n - t >= 2) {
    MultiplyTokens<kBits, 2>(tile, t);
    t += 2;
  }
  if (t < n) MultiplyTokens<kBits, 1>(tile, t);
}

void Multiply(const PackedTile& tile, int bits, bool expanded) {
  switch (expanded ? 8 : bits) {
    case 2:
      return MultiplyBits<2>(tile);
    case 3:
      return MultiplyBits<3>(tile);
    case 4:
      return MultiplyBits<4>(tile);
    default:
      return MultiplyBits<8>(tile);
  }
}

template <int kBits, int kStep = 0>
WALSH_TARGET_INLINE void ExpandSteps(const uint8_t* block, uint8_t* bytes) {
  if constexpr (kStep < kBlockSteps) {
    _mm512_store_si512(bytes + kStep * kVectorBytes, UnpackStep<kBits, kStep>(block));
    ExpandSteps<kBits, kStep + 1>(block, bytes);
  }
}

template <int kBits>
WALSH_TARGET void ExpandBits(const uint8_t* codes, int64_t n_blocks, uint8_t* bytes) {
  for (int64_t block = 0; block < n_blocks; ++block) {
    ExpandSteps<kBits>(codes + block * BlockBytes(kBits), bytes + block * BlockBytes(8));
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

PackedKernel Avx512VnniPackedKernel() {
  return {.multiply = Multiply,
          .multiply_levels = MultiplyLevels,
          .expand = Expand,
          .expand_tokens_min = 9,
          .name = "AVX-512 VNNI"};
}

}  // namespace walsh::kernels::cpu
