// Activations as block fixed point, the B operand of LowBitMatmul's products.
//
// 128 columns of a token share a power of two, 2^e, the least with |x| < 32639.5 · 2^e:
//   x = 2^e · q,  q = 256 · hi + lo,  hi and lo signed bytes                               (1)
// so that two int8 products give the sum of a 16-bit one, exactly. A bf16 number of at least 1/128
// of the largest of its block is represented exactly, anything else to 2^-16 of the largest.
//
// A record is what a token and block become, in the order in which lanes of a warp want it: the
// bytes of B fragments of four mma.m16n8k32, then for each group of columns 2^e and Σ q.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "worker/kernels/cuda/serving_codes.h"

namespace walsh::kernels::cuda::low_bit {

inline constexpr int kRecordCodeBytes = 2 * kServingBlockCols;
__host__ __device__ constexpr int RecordBytes(int grids) {
  constexpr int kAlignment = 16;
  return kRecordCodeBytes + (8 * grids + kAlignment - 1) / kAlignment * kAlignment;
}

// The activations of a product: one of x_bf16 and x_float, before RMSNorm where `has_norm`.
struct Activations {
  const __nv_bfloat16* x_bf16 = nullptr;
  const float* x_float = nullptr;
  int64_t stride = 0;
  int cols = 0;
  const float* norm_weight = nullptr;
  bool has_norm = false;
  const int32_t* order = nullptr;  // column c is x[order[c]]; null: x[c]
  int rotation_block = 0;          // of Hadamard matrices: 16, 32, 64 or 128; 0: none
};
// Whether columns are moved or rotated on their way.
inline bool AreTransformed(const Activations& a) {
  return a.order != nullptr || a.rotation_block != 0;
}

// kLanes lanes make a record, 8 or 16, so that a warp makes four or two at a time: with 8 it takes
// fewer instructions in all, with 16 fewer of each lane. A lane has quads of columns whose bytes
// are adjacent in the record.
inline constexpr int kRecordLanes = 8;  // where there are many records
template <int kLanes>
inline constexpr int kPieceQuads = kServingBlockCols / kLanes / 4;
template <int kLanes>
__device__ __forceinline__ int PieceColumn(int lane, int m) {
  return (lane / 4 * kPieceQuads<kLanes> + m) * 16 + lane % 4 * 4;
}

template <int kLanes>
struct ActivationPiece {
  float4 x[kPieceQuads<kLanes>];
};
template <int kLanes>
struct Bf16Piece {
  uint2 x[kPieceQuads<kLanes>];
};

// Of a token and block, from the first column of a lane on, of which `n_cols` are left: zeros
// beyond. Written by the kernel before: not by way of the read-only cache.
template <int kLanes>
__device__ __forceinline__ Bf16Piece<kLanes> LoadPiece(const __nv_bfloat16* x, int n_cols) {
  Bf16Piece<kLanes> piece{};
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    if (m * 16 < n_cols) piece.x[m] = *reinterpret_cast<const uint2*>(x + m * 16);
  }
  return piece;
}
template <int kLanes>
__device__ __forceinline__ ActivationPiece<kLanes> LoadPiece(const float* x, int n_cols) {
  ActivationPiece<kLanes> piece{};
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    if (m * 16 < n_cols) piece.x[m] = *reinterpret_cast<const float4*>(x + m * 16);
  }
  return piece;
}
template <int kLanes>
__device__ __forceinline__ ActivationPiece<kLanes> ToFloats(const ActivationPiece<kLanes>& piece) {
  return piece;
}
template <int kLanes>
__device__ __forceinline__ ActivationPiece<kLanes> ToFloats(const Bf16Piece<kLanes>& piece) {
  ActivationPiece<kLanes> floats;
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    const uint2 v = piece.x[m];
    floats.x[m] = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u),
                              __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000u));
  }
  return floats;
}
// The factors of RMSNorm for a piece whose first column is `col`, 1 where there are none.
template <int kLanes>
__device__ __forceinline__ ActivationPiece<kLanes> LoadNormWeight(const Activations& a, int col) {
  ActivationPiece<kLanes> piece;
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    piece.x[m] = a.norm_weight != nullptr && col + m * 16 < a.cols
                     ? *reinterpret_cast<const float4*>(a.norm_weight + col + m * 16)
                     : make_float4(1, 1, 1, 1);
  }
  return piece;
}

// Columns that are in another order: each a load of its own. Factors of RMSNorm as above.
template <int kLanes>
__device__ __forceinline__ void LoadOrderedPiece(const Activations& a, int64_t token, int block,
                                                 int lane, ActivationPiece<kLanes>& piece,
                                                 ActivationPiece<kLanes>& weight) {
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    const int col = block * kServingBlockCols + PieceColumn<kLanes>(lane, m);
    piece.x[m] = make_float4(0, 0, 0, 0);
    weight.x[m] = make_float4(1, 1, 1, 1);
    if (col >= a.cols) continue;
    const int4 from = *reinterpret_cast<const int4*>(a.order + col);
    const auto gather = [&](auto&& load) {
      return make_float4(load(from.x), load(from.y), load(from.z), load(from.w));
    };
    const int64_t row = token * a.stride;
    piece.x[m] = a.x_float != nullptr
                     ? gather([&](int i) { return a.x_float[row + i]; })
                     : gather([&](int i) { return __bfloat162float(a.x_bf16[row + i]); });
    if (a.norm_weight != nullptr) weight.x[m] = gather([&](int i) { return a.norm_weight[i]; });
  }
}
// Whatever becomes of the columns before they are multiplied and rotated.
template <int kLanes>
__device__ __forceinline__ void LoadAnyPiece(const Activations& a, int64_t token, int block,
                                             int lane, ActivationPiece<kLanes>& piece,
                                             ActivationPiece<kLanes>& weight) {
  if (a.order != nullptr) {
    LoadOrderedPiece(a, token, block, lane, piece, weight);
    return;
  }
  const int col = block * kServingBlockCols + PieceColumn<kLanes>(lane, 0);
  const int64_t at = token * a.stride + col;
  piece = a.x_float != nullptr ? LoadPiece<kLanes>(a.x_float + at, a.cols - col)
                               : ToFloats(LoadPiece<kLanes>(a.x_bf16 + at, a.cols - col));
  weight = LoadNormWeight<kLanes>(a, col);
}

// Σ x² of a record, in all its lanes, added up in one order, however many these are.
template <int kLanes>
__device__ __forceinline__ float SumOfSquares(const ActivationPiece<kLanes>& piece) {
  constexpr int kPairs = kPieceQuads<kLanes> / 2;
  float sums[kPairs];  // of 32 columns
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    sums[i] = 0;
#pragma unroll
    for (int m = 2 * i; m < 2 * i + 2; ++m) {
      const float4 x = piece.x[m];
      sums[i] = __fmaf_rn(x.x, x.x, sums[i]);
      sums[i] = __fmaf_rn(x.y, x.y, sums[i]);
      sums[i] = __fmaf_rn(x.z, x.z, sums[i]);
      sums[i] = __fmaf_rn(x.w, x.w, sums[i]);
    }
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(~0u, sums[i], distance));
    }
  }
  float sum = sums[0];
  if constexpr (kPairs == 2) sum = __fadd_rn(sum, sums[1]);
#pragma unroll
  for (int distance = 4; distance < kLanes; distance *= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  }
  return sum;
}
template <int kLanes>
__device__ __forceinline__ void Multiply(ActivationPiece<kLanes>& piece,
                                         const ActivationPiece<kLanes>& factor) {
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    piece.x[m].x = __fmul_rn(piece.x[m].x, factor.x[m].x);
    piece.x[m].y = __fmul_rn(piece.x[m].y, factor.x[m].y);
    piece.x[m].z = __fmul_rn(piece.x[m].z, factor.x[m].z);
    piece.x[m].w = __fmul_rn(piece.x[m].w, factor.x[m].w);
  }
}

__device__ __forceinline__ void Butterfly(float& a, float& b) {
  const float sum = __fadd_rn(a, b);
  b = __fsub_rn(a, b);
  a = sum;
}
__device__ __forceinline__ void Butterfly(float4& a, float4& b) {
  Butterfly(a.x, b.x);
  Butterfly(a.y, b.y);
  Butterfly(a.z, b.z);
  Butterfly(a.w, b.w);
}
// Of the bit of the column that bit `distance` of the lane is.
template <int kLanes>
__device__ __forceinline__ void ButterflyOfLanes(ActivationPiece<kLanes>& piece, int lane,
                                                 int distance) {
  const float sign = (lane & distance) != 0 ? -1.0f : 1.0f;
  const auto combine = [&](float v) {
    return __fmaf_rn(sign, v, __shfl_xor_sync(~0u, v, distance));
  };
#pragma unroll
  for (float4& x : piece.x) {
    x = make_float4(combine(x.x), combine(x.y), combine(x.z), combine(x.w));
  }
}
// Each block of columns times the orthonormal Hadamard matrix in natural order. Bits of a column:
// 0 and 1 lie within a quad, 2 and 3 in the lane, the rest first in the quad's number, then in the
// lane. All lanes of a warp.
template <int kLanes>
__device__ __forceinline__ void RotatePiece(ActivationPiece<kLanes>& piece, int lane, int block) {
  constexpr int kQuads = kPieceQuads<kLanes>;
#pragma unroll
  for (float4& x : piece.x) {
    Butterfly(x.x, x.y);
    Butterfly(x.z, x.w);
    Butterfly(x.x, x.z);
    Butterfly(x.y, x.w);
  }
  ButterflyOfLanes(piece, lane, 1);
  ButterflyOfLanes(piece, lane, 2);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {  // of quads of a column block
    if (block <= distance * 16) break;
    if (distance < kQuads) {
#pragma unroll
      for (int m = 0; m < kQuads; ++m) {
        if ((m & distance) == 0) Butterfly(piece.x[m], piece.x[m | distance]);
      }
    } else {
      ButterflyOfLanes(piece, lane, distance / kQuads * 4);
    }
  }
  const float scale = __frsqrt_rn(static_cast<float>(block));
#pragma unroll
  for (float4& x : piece.x) {
    x = make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale), __fmul_rn(x.z, scale),
                    __fmul_rn(x.w, scale));
  }
}

// max(|a|, |b|), NaN where one is.
__device__ __forceinline__ float LargerMagnitude(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
  return larger;
}

// All lanes of a warp, of which those write whose record is there. The products are of
// codes · 2^code_shift, which the record's numbers take back. What is not finite makes 2^e NaN, and
// so every output of the token.
template <int kLanes>
__device__ __forceinline__ void WriteRecord(const ActivationPiece<kLanes>& piece, int lane,
                                            int grids, int code_shift, bool is_there,
                                            uint8_t* record) {
  constexpr int kQuads = kPieceQuads<kLanes>;
  float largest = 0;
#pragma unroll
  for (const float4& x : piece.x) {
    const float first = LargerMagnitude(x.x, x.y);
    largest = LargerMagnitude(largest, LargerMagnitude(first, LargerMagnitude(x.z, x.w)));
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    largest = LargerMagnitude(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  // The exponent that leaves |q| ≤ 32639, the most that two signed bytes hold.
  constexpr float kHeadroom = 1.00396f;  // > 2^15 / 32639
  constexpr uint32_t kNotFinite = 255;
  constexpr uint32_t kSmallest = 27;  // 2^-100: blocks below are zeros
  const uint32_t exponent = __float_as_uint(__fmul_rn(largest, kHeadroom)) >> 23;
  const bool is_number = exponent >= kSmallest && exponent < kNotFinite;
  const float inverse = is_number ? __uint_as_float((268u - exponent) << 23) : 0.0f;
  float scale = is_number ? __uint_as_float((exponent - 14u - code_shift) << 23) : 0.0f;
  if (exponent >= kNotFinite) scale = __uint_as_float(0x7FC00000u);

  // The low bits of 1.5 · 2^23 + 128 + q are those of q + 128: byte 1 is hi, byte 0 is lo + 128.
  constexpr float kMagic = 12582912.0f + 128.0f;
  uint32_t high[kQuads];
  uint32_t low[kQuads];
  int sums[kQuads / 2] = {};  // of 32 columns
#pragma unroll
  for (int m = 0; m < kPieceQuads<kLanes>; ++m) {
    const float v[4] = {piece.x[m].x, piece.x[m].y, piece.x[m].z, piece.x[m].w};
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(__fmaf_rn(v[i], inverse, kMagic));
    const uint32_t first = __byte_perm(q[0], q[1], 0x5140);
    const uint32_t second = __byte_perm(q[2], q[3], 0x5140);
    low[m] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
    high[m] = __byte_perm(first, second, 0x7632);
    sums[m / 2] += static_cast<int>(q[0] + q[1] + q[2] + q[3] - 4u * __float_as_uint(kMagic));
  }
  // The words of two steps and both registers of a quad's lane; halves of two steps, of them first
  // hi.
  if (is_there) {
    const int quad = lane / 4 * kQuads;
    uint8_t* const at = record + quad / 4 * 128 + lane % 4 * 16 + quad % 4 * 4;
    if constexpr (kQuads == 4) {
      *reinterpret_cast<uint4*>(at) = make_uint4(high[0], high[1], high[2], high[3]);
      *reinterpret_cast<uint4*>(at + 64) = make_uint4(low[0], low[1], low[2], low[3]);
    } else {
      *reinterpret_cast<uint2*>(at) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(at + 64) = make_uint2(low[0], low[1]);
    }
  }
  // Groups of 32 columns, four lanes, may be two in a lane; others have as many lanes as columns.
  const bool has_two = kQuads == 4 && grids == 4;
  if constexpr (kQuads == 4) {
    if (!has_two) sums[0] += sums[1];
  }
  const int group_lanes = has_two ? 4 : kLanes / grids;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    if (distance == group_lanes) break;
    sums[0] += __shfl_xor_sync(~0u, sums[0], distance);
    if constexpr (kQuads == 4) {
      if (has_two) sums[1] += __shfl_xor_sync(~0u, sums[1], distance);
    }
  }
  if (!is_there || lane % group_lanes != 0) return;
  auto* numbers = reinterpret_cast<float2*>(record + kRecordCodeBytes);
  const auto write = [&](int group, int sum) {
    numbers[group] = make_float2(scale, static_cast<float>(sum << code_shift));
  };
  if constexpr (kQuads == 4) {
    if (has_two) {
      write(lane / 4 * 2, sums[0]);
      write(lane / 4 * 2 + 1, sums[1]);
      return;
    }
  }
  write(lane / group_lanes, sums[0]);
}

}  // namespace walsh::kernels::cuda::low_bit
