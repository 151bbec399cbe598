// Keys and values as codes of a grid (paged_kv.h): a head becomes codes, by a warp that holds it as
// in qkv_head.cuh, and codes become the operands of products.
//
// Quantizing is kernels::FakeQuantize's asymmetric form; products and sums are rounded where they
// stand, whatever is inlined around them, so that a head has the same codes in every kernel.
//
// In products the zero is taken off the code, which is an integer that bf16 holds exactly, and the
// scale is left to what the product gives or takes: the cache adds no rounding to that of its grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "worker/kernels/cuda/block_walsh.cuh"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/qkv_head.cuh"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {

// -- Grids --------------------------------------------------------------------------------------

inline constexpr uint32_t kZeroMask = 0xff;

__device__ __forceinline__ float ScaleOf(uint32_t grid) {
  return __uint_as_float(grid & ~kZeroMask);
}
__device__ __forceinline__ int ZeroOf(uint32_t grid) { return static_cast<int>(grid & kZeroMask); }

// Of a group whose values lie between low ≤ 0 and high ≥ 0. NaN where one is not finite, and scale
// 0 where the span is below 2^-100: what is read back is NaN, or zeros.
template <int kBits>
__device__ __forceinline__ uint32_t GridOf(float low, float high, float clip) {
  constexpr float kLevels = (1 << kBits) - 1;
  constexpr uint32_t kNotANumber = 0x7fffff00;
  constexpr float kSpanMin = 0x1p-100f;
  high = __fmul_rn(clip, high);
  low = __fmul_rn(clip, low);
  const float span = __fsub_rn(high, low);
  if (!(span < INFINITY)) return kNotANumber;
  if (span < kSpanMin) return 0;
  const uint32_t bits = __float_as_uint(__fdiv_rn(span, kLevels));
  const uint32_t rounded = (bits + (kZeroMask + 1) / 2) & ~kZeroMask;
  const float zero = rintf(__fdiv_rn(-low, __uint_as_float(rounded)));
  return rounded | static_cast<uint32_t>(fminf(zero, kLevels));
}

// -- A head that a warp holds ---------------------------------------------------------------------

// x ← x · H, Sylvester's matrix of the head's width, a power of two, over its square root. Bits of
// an element's index are: of a pair, of the lane, of the pair's number, and of the half.
template <int kPairs>
__device__ __forceinline__ void HadamardHead(HeadPairs<kPairs>& head, int half) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    Butterfly(head.low[i].x, head.low[i].y);
    Butterfly(head.high[i].x, head.high[i].y);
#pragma unroll
    for (int mask = 1; mask < kWarpSize; mask *= 2) {
      if (mask * 2 >= half) continue;
      const bool is_upper = (lane & mask) != 0;
      head.low[i].x = ShuffleButterfly(head.low[i].x, mask, is_upper);
      head.low[i].y = ShuffleButterfly(head.low[i].y, mask, is_upper);
      head.high[i].x = ShuffleButterfly(head.high[i].x, mask, is_upper);
      head.high[i].y = ShuffleButterfly(head.high[i].y, mask, is_upper);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kPairs; distance *= 2) {
    if (distance * 2 * kWarpSize >= half) continue;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i / distance % 2 != 0 || i + distance >= kPairs) continue;
      Butterfly(head.low[i].x, head.low[i + distance].x);
      Butterfly(head.low[i].y, head.low[i + distance].y);
      Butterfly(head.high[i].x, head.high[i + distance].x);
      Butterfly(head.high[i].y, head.high[i + distance].y);
    }
  }
  const float scale = __frsqrt_rn(static_cast<float>(2 * half));
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    Butterfly(head.low[i].x, head.high[i].x);
    Butterfly(head.low[i].y, head.high[i].y);
    head.low[i] = {__fmul_rn(head.low[i].x, scale), __fmul_rn(head.low[i].y, scale)};
    head.high[i] = {__fmul_rn(head.high[i].x, scale), __fmul_rn(head.high[i].y, scale)};
  }
}

// Moves elements from natural order to that of sequency, through `scratch` [2 · half] of this warp.
template <int kPairs>
__device__ __forceinline__ void SortBySequency(HeadPairs<kPairs>& head, int half, float* scratch) {
  const int log2_width = 31 - __clz(2 * half);
  const auto place = [&](int n) { return SequencyIndex(n, log2_width); };
  ForHeadPairs<kPairs>(half, [&](int i, int at) {
    scratch[place(at)] = head.low[i].x;
    scratch[place(at + 1)] = head.low[i].y;
    scratch[place(half + at)] = head.high[i].x;
    scratch[place(half + at + 1)] = head.high[i].y;
  });
  __syncwarp();
  head = LoadHead<kPairs>(scratch, half);
  __syncwarp();
}

// Writes a head's codes and grids. `group`: values that share a grid, all 2 · half or a divisor of
// half that is 32, 64 or 128.
template <int kBits, int kPairs>
__device__ __forceinline__ void StoreHeadCodes(unsigned char* codes, uint32_t* grids,
                                               const HeadPairs<kPairs>& head, int half, int group,
                                               float clip) {
  constexpr float kLevels = (1 << kBits) - 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_whole = group == 2 * half;
  struct Range {
    float low, high;
  };
  const auto merge = [](Range a, Range b) {
    return Range{fminf(a.low, b.low), fmaxf(a.high, b.high)};
  };
  const auto range_of = [](float2 x) {
    // fminf and fmaxf pass over a NaN.
    const bool is_finite = fabsf(x.x) < INFINITY && fabsf(x.y) < INFINITY;
    return is_finite ? Range{fminf(fminf(x.x, x.y), 0.0f), fmaxf(fmaxf(x.x, x.y), 0.0f)}
                     : Range{0.0f, INFINITY};
  };
  Range low[kPairs];
  Range high[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    low[i] = range_of(head.low[i]);
    high[i] = range_of(head.high[i]);
    if (is_whole) low[i] = high[i] = merge(low[i], high[i]);
  }
  if (group > 2 * kWarpSize) {
#pragma unroll
    for (int i = 1; i < kPairs; ++i) {
      low[0] = merge(low[0], low[i]);
      high[0] = merge(high[0], high[i]);
    }
#pragma unroll
    for (int i = 1; i < kPairs; ++i) {
      low[i] = low[0];
      high[i] = high[0];
    }
  }
  const auto of_lane = [](Range x, int mask) {
    return Range{__shfl_xor_sync(~0u, x.low, mask), __shfl_xor_sync(~0u, x.high, mask)};
  };
  const int group_lanes = is_whole ? kWarpSize : min(group / 2, kWarpSize);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    for (int mask = 1; mask < group_lanes; mask *= 2) {
      low[i] = merge(low[i], of_lane(low[i], mask));
      high[i] = merge(high[i], of_lane(high[i], mask));
    }
  }

  // Both of a pair, the second in the upper 16 bits.
  const auto codes_of = [&](float2 x, uint32_t grid) {
    const float scale = ScaleOf(grid);
    const float inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
    const auto zero = static_cast<float>(ZeroOf(grid));
    const auto code = [&](float value) {
      const float place = __fadd_rn(rintf(__fmul_rn(value, inverse)), zero);
      return static_cast<uint32_t>(fminf(fmaxf(place, 0.0f), kLevels));
    };
    return code(x.x) | code(x.y) << 16;
  };
  const auto store = [&](int at, float2 x, Range range) {
    const uint32_t grid = GridOf<kBits>(range.low, range.high, clip);
    const bool is_there = at < 2 * half;
    const uint32_t pair = codes_of(x, grid);
    if constexpr (kBits == 8) {
      if (is_there) {
        *reinterpret_cast<uint16_t*>(codes + at) = static_cast<uint16_t>(pair | pair >> 8);
      }
    } else {
      // Four lanes have 8 neighbours.
      uint32_t word = pair << (lane % 4 * 4);
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (is_there && lane % 4 == 0) *reinterpret_cast<uint32_t*>(codes + at / 2) = word;
    }
    if (is_there && at % group == 0) grids[at / group] = grid;
  };
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = (i * kWarpSize + lane) * 2;
    store(at < half ? at : 2 * half, head.low[i], low[i]);
    store(at < half ? half + at : 2 * half, head.high[i], high[i]);
  }
}

// -- Codes in products ----------------------------------------------------------------------------

// Pairs of codes less their zeros, as bf16.
template <int kBits>
struct CodePairs;

template <>
struct CodePairs<8> {
  // 2^23 and a byte beneath it are a float.
  static constexpr uint32_t kMagic = 0x4B000000;
  __device__ __forceinline__ static float MagicOf(int zero) {
    return __uint_as_float(kMagic | static_cast<uint32_t>(zero));
  }
  // Byte `byte` of `word` without what MagicOf gave.
  __device__ __forceinline__ static float Value(uint32_t word, int byte, float magic) {
    return __uint_as_float(__byte_perm(word, kMagic, 0x7650 | byte)) - magic;
  }
};

template <>
struct CodePairs<4> {
  // 128 and 4 bits beneath it are a bf16.
  static constexpr uint32_t kMagic = 0x43004300;
  __device__ __forceinline__ static uint32_t MagicOf(int zero_of_low, int zero_of_high) {
    return kMagic | static_cast<uint32_t>(zero_of_low) | static_cast<uint32_t>(zero_of_high) << 16;
  }
  // 4 bits of each half of `word`, its `index`-th, without what MagicOf gave.
  __device__ __forceinline__ static unsigned Pair(uint32_t word, int index, uint32_t magic) {
    const uint32_t codes = (word >> (4 * index) & 0x000f000f) | kMagic;
    const __nv_bfloat162 pair = __hsub2(reinterpret_cast<const __nv_bfloat162&>(codes),
                                        reinterpret_cast<const __nv_bfloat162&>(magic));
    return reinterpret_cast<const unsigned&>(pair);
  }
};

// 8 neighbours as bf16, from where their codes are, in shared memory.
template <int kBits>
__device__ __forceinline__ uint4 DequantizeCodes(const unsigned char* codes, uint32_t grid) {
  const float scale = ScaleOf(grid);
  unsigned pairs[4];
  if constexpr (kBits == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(codes);
    const float magic = CodePairs<8>::MagicOf(ZeroOf(grid));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? words.x : words.y;
      pairs[i] = PackBf16(CodePairs<8>::Value(word, i % 2 * 2, magic) * scale,
                          CodePairs<8>::Value(word, i % 2 * 2 + 1, magic) * scale);
    }
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(codes);
    const int zero = ZeroOf(grid);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto value = [&](int shift) {
        return static_cast<float>(static_cast<int>(word >> shift & 0xf) - zero) * scale;
      };
      pairs[i] = PackBf16(value(4 * i), value(4 * i + 16));
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace walsh::kernels::cuda
