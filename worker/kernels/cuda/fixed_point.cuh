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

// Eight lanes make a record, so that a warp makes four at a time. Lane l of them has the columns
// 64 (l / 4) + 16 m + 4 (l % 4) + {0, 1, 2, 3} of the block, m from 0 to 3, whose bytes are
// adjacent in the record.
inline constexpr int kRecordLanes = 8;
__device__ __forceinline__ int PieceColumn(int lane, int m) {
  return lane / 4 * 64 + m * 16 + lane % 4 * 4;
}
__device__ __forceinline__ uint32_t MaxOfLanes(uint32_t v) {
#pragma unroll
  for (int distance = 1; distance < kRecordLanes; distance *= 2) {
    v = max(v, __shfl_xor_sync(~0u, v, distance));
  }
  return v;
}

struct ActivationPiece {
  float4 x[4];
};
struct Bf16Piece {
  uint2 x[4];
};

// Of a token and block; zeros beyond the last column. Written by the kernel before: not by way of
// the read-only cache.
__device__ __forceinline__ Bf16Piece LoadBf16Piece(const Activations& a, int64_t token, int block,
                                                   int lane) {
  Bf16Piece piece{};
  const int first = block * kServingBlockCols;
  const __nv_bfloat16* x = a.x_bf16 + token * a.stride + first;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int col = PieceColumn(lane, m);
    if (first + col < a.cols) piece.x[m] = *reinterpret_cast<const uint2*>(x + col);
  }
  return piece;
}
__device__ __forceinline__ ActivationPiece ToFloats(const Bf16Piece& piece) {
  ActivationPiece floats;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const uint2 v = piece.x[m];
    floats.x[m] = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u),
                              __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000u));
  }
  return floats;
}
__device__ __forceinline__ ActivationPiece LoadFloatPiece(const Activations& a, int64_t token,
                                                          int block, int lane) {
  ActivationPiece piece{};
  const int first = block * kServingBlockCols;
  const float* x = a.x_float + token * a.stride + first;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int col = PieceColumn(lane, m);
    if (first + col < a.cols) piece.x[m] = *reinterpret_cast<const float4*>(x + col);
  }
  return piece;
}
// The factors of RMSNorm for the columns of a piece, 1 where there are none.
__device__ __forceinline__ ActivationPiece LoadNormWeight(const Activations& a, int block,
                                                          int lane) {
  ActivationPiece piece;
  const int first = block * kServingBlockCols;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int col = first + PieceColumn(lane, m);
    piece.x[m] = a.norm_weight != nullptr && col < a.cols
                     ? *reinterpret_cast<const float4*>(a.norm_weight + col)
                     : make_float4(1, 1, 1, 1);
  }
  return piece;
}

// Columns that are in another order: each a load of its own. Factors of RMSNorm as above.
__device__ __forceinline__ void LoadOrderedPiece(const Activations& a, int64_t token, int block,
                                                 int lane, ActivationPiece& piece,
                                                 ActivationPiece& weight) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int col = block * kServingBlockCols + PieceColumn(lane, m);
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
__device__ __forceinline__ void LoadAnyPiece(const Activations& a, int64_t token, int block,
                                             int lane, ActivationPiece& piece,
                                             ActivationPiece& weight) {
  if (a.order != nullptr) {
    LoadOrderedPiece(a, token, block, lane, piece, weight);
    return;
  }
  piece = a.x_float != nullptr ? LoadFloatPiece(a, token, block, lane)
                               : ToFloats(LoadBf16Piece(a, token, block, lane));
  weight = LoadNormWeight(a, block, lane);
}

// Σ x² of a record, in all its lanes, added up in one order.
__device__ __forceinline__ float SumOfSquares(const ActivationPiece& piece) {
  float sum = 0;
#pragma unroll
  for (const float4& x : piece.x) {
    sum = __fmaf_rn(x.x, x.x, sum);
    sum = __fmaf_rn(x.y, x.y, sum);
    sum = __fmaf_rn(x.z, x.z, sum);
    sum = __fmaf_rn(x.w, x.w, sum);
  }
#pragma unroll
  for (int distance = 1; distance < kRecordLanes; distance *= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  }
  return sum;
}
__device__ __forceinline__ void Multiply(ActivationPiece& piece, const ActivationPiece& factor) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
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
__device__ __forceinline__ void ButterflyOfLanes(ActivationPiece& piece, int lane, int distance) {
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
// 0 and 1 lie within a quad, 2 and 3 in the lane, 4 and 5 in the quad's number, 6 in the lane. All
// lanes of a warp.
__device__ __forceinline__ void RotatePiece(ActivationPiece& piece, int lane, int block) {
#pragma unroll
  for (float4& x : piece.x) {
    Butterfly(x.x, x.y);
    Butterfly(x.z, x.w);
    Butterfly(x.x, x.z);
    Butterfly(x.y, x.w);
  }
  ButterflyOfLanes(piece, lane, 1);
  ButterflyOfLanes(piece, lane, 2);
  if (block >= 32) {
    Butterfly(piece.x[0], piece.x[1]);
    Butterfly(piece.x[2], piece.x[3]);
  }
  if (block >= 64) {
    Butterfly(piece.x[0], piece.x[2]);
    Butterfly(piece.x[1], piece.x[3]);
  }
  if (block >= 128) ButterflyOfLanes(piece, lane, 4);
  const float scale = __frsqrt_rn(static_cast<float>(block));
#pragma unroll
  for (float4& x : piece.x) {
    x = make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale), __fmul_rn(x.z, scale),
                    __fmul_rn(x.w, scale));
  }
}

// All lanes of a warp, of which those write whose record is there. The products are of
// codes · 2^code_shift, which the record's numbers take back. What is not finite makes 2^e NaN, and
// so every output of the token.
__device__ __forceinline__ void WriteRecord(const ActivationPiece& piece, int lane, int grids,
                                            int code_shift, bool is_there, uint8_t* record) {
  uint32_t largest = 0;  // as bits, so that NaN counts
#pragma unroll
  for (const float4& x : piece.x) {
    largest = max(largest, __float_as_uint(x.x) & 0x7FFFFFFFu);
    largest = max(largest, __float_as_uint(x.y) & 0x7FFFFFFFu);
    largest = max(largest, __float_as_uint(x.z) & 0x7FFFFFFFu);
    largest = max(largest, __float_as_uint(x.w) & 0x7FFFFFFFu);
  }
  largest = MaxOfLanes(largest);
  // The exponent that leaves |q| ≤ 32639, the most that two signed bytes hold.
  constexpr float kHeadroom = 1.00396f;  // > 2^15 / 32639
  constexpr uint32_t kNotFinite = 255;
  constexpr uint32_t kSmallest = 27;  // 2^-100: blocks below are zeros
  const uint32_t exponent = __float_as_uint(__fmul_rn(__uint_as_float(largest), kHeadroom)) >> 23;
  const bool is_number = exponent >= kSmallest && exponent < kNotFinite;
  const float inverse = is_number ? __uint_as_float((268u - exponent) << 23) : 0.0f;
  float scale = is_number ? __uint_as_float((exponent - 14u - code_shift) << 23) : 0.0f;
  if (exponent >= kNotFinite) scale = __uint_as_float(0x7FC00000u);

  // The low bits of 1.5 · 2^23 + 128 + q are those of q + 128: byte 1 is hi, byte 0 is lo + 128.
  constexpr float kMagic = 12582912.0f + 128.0f;
  uint32_t high[4];
  uint32_t low[4];
  int sums[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float v[4] = {piece.x[m].x, piece.x[m].y, piece.x[m].z, piece.x[m].w};
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(__fmaf_rn(v[i], inverse, kMagic));
    const uint32_t first = __byte_perm(q[0], q[1], 0x5140);
    const uint32_t second = __byte_perm(q[2], q[3], 0x5140);
    low[m] = __byte_perm(first, second, 0x5410) ^ 0x80808080u;
    high[m] = __byte_perm(first, second, 0x7632);
    sums[m] = static_cast<int>(q[0] + q[1] + q[2] + q[3] - 4u * __float_as_uint(kMagic));
  }
  // The words of two steps and both registers of a quad's lane; halves of two steps, of them first
  // hi.
  if (is_there) {
    uint8_t* const at = record + lane / 4 * 128 + lane % 4 * 16;
    *reinterpret_cast<uint4*>(at) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(at + 64) = make_uint4(low[0], low[1], low[2], low[3]);
  }
  int first_sum = sums[0] + sums[1];  // of step 2 (lane / 4), and of the next
  int second_sum = sums[2] + sums[3];
  if (grids < 4) first_sum += second_sum;
#pragma unroll
  for (int distance = 1; distance < kRecordLanes; distance *= 2) {
    if (distance == 4 && grids > 1) break;
    first_sum += __shfl_xor_sync(~0u, first_sum, distance);
    if (grids == 4) second_sum += __shfl_xor_sync(~0u, second_sum, distance);
  }
  if (!is_there || lane % 4 != 0 || (grids == 1 && lane != 0)) return;
  auto* numbers = reinterpret_cast<float2*>(record + kRecordCodeBytes);
  const float2 first_numbers = make_float2(scale, static_cast<float>(first_sum << code_shift));
  if (grids < 4) {
    numbers[lane / 4] = first_numbers;
  } else {
    numbers[lane / 4 * 2] = first_numbers;
    numbers[lane / 4 * 2 + 1] = make_float2(scale, static_cast<float>(second_sum << code_shift));
  }
}

}  // namespace walsh::kernels::cuda::low_bit
