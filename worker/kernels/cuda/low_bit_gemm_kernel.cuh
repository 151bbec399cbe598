// The kernel of LowBitGemm (worker/kernels/cuda/low_bit_gemm.h) and its launch, for one width in
// each file that includes this.
//
// A CTA makes 128 or 256 rows of W times up to 256 tokens: warpgroups with 64 rows each, and a warp
// that fills a ring of stages by bulk copies, far ahead. A stage is a block of 128 columns: row
// tiles of the serving layout, as they lie in memory, and two pieces of token tiles. The layout's
// lanes hold just the codes that a wgmma's A fragments want from them, so that dequantizing needs
// no exchange; while the products of 32 columns run, those of the next 32 are dequantized.
//
// Where there are few tiles, the CTAs of a cluster share the columns of one, and each adds up all
// their sums for some of the tokens, in one order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/bulk_copy.cuh"
#include "worker/kernels/cuda/cluster.cuh"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/gated_unit.cuh"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/reduce.cuh"
#include "worker/kernels/cuda/serving_codes.h"
#include "worker/kernels/cuda/token_tiles.cuh"
#include "worker/kernels/cuda/wgmma.cuh"

namespace walsh::kernels::cuda::low_bit_gemm {

inline constexpr int kPieces = kServingBlockCols / kTilePieceCols;  // of a stage
inline constexpr int kStagesMax = 8;
inline constexpr int kSplitMax = 8;              // CTAs of a cluster that any device takes
inline constexpr int kSharedMax = 227 << 10;     // of a CTA
inline constexpr int kSharedReserved = 1 << 10;  // beside it, by the system
inline constexpr int kStageAlignment = 1024;     // of token tiles; kept for weights, too

// What a CTA makes: kRows rows of W times kTokens tokens.
template <int kTokens_>
struct Tile {
  static constexpr int kTokens = kTokens_;
  // Of 64 rows each. Four share the tokens where these are more bytes than the weights, but no
  // registers are left for sums of more.
  static constexpr int kWarpgroups = kTokens == 64 ? 4 : 2;
  static constexpr int kRows = kWarpgroups * kWgmmaRows;
  static constexpr int kRowTiles = kRows / kServingTileRows;
  static constexpr int kMultiplyThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kMultiplyWarps = kMultiplyThreads / kWarpSize;
  static constexpr int kCtasPerSm = kTokens < 64 ? 2 : 1;
  // A quarter of a multiprocessor has 512 registers of a lane for its share of all warps. Where
  // those that multiply need more than that gives them, those that copy give some of their own
  // away, which takes a whole warpgroup.
  static constexpr bool kMovesRegisters = kTokens >= 64;
  static constexpr int kMultiplyRegisters = kTokens == 64 ? 112 : 240;
  static constexpr int kCopyRegisters = 24;
  // Of a CTA, for a block of columns, as measured on an H200.
  static constexpr double kBlockUs = kTokens == 16    ? 0.6
                                     : kTokens == 32  ? 0.7
                                     : kTokens == 64  ? 0.85
                                     : kTokens == 128 ? 0.8
                                                      : 1.5;
  static constexpr int kThreads =
      kMultiplyThreads + (kMovesRegisters ? kWarpgroupThreads : kWarpSize);
  // Sums of 256 tokens leave no registers for those of a group apart.
  static constexpr bool kSumsAreScaled = kTokens <= 128;
  // Floats from token to token of the sums: fragments are written without bank conflicts.
  static constexpr int kSumsStride = kRows + 4;
  static constexpr int kSumsBytes = kTokens * kSumsStride * static_cast<int>(sizeof(float));
  static constexpr int kPieceBytes = kTokens * kWgmmaRowBytes;
  static constexpr int kTokenBytes = kPieces * kPieceBytes;  // of a stage
  static constexpr int WeightBytes(int block_bytes) {
    return (kRowTiles * block_bytes + kStageAlignment - 1) / kStageAlignment * kStageAlignment;
  }
};

struct KernelParams {
  const uint8_t* weights = nullptr;
  int n_row_tiles = 0;
  int n_blocks = 0;  // of columns
  int block_bytes = 0;
  int grids = 0;  // of a block: 1, 2 or 4
  const __nv_bfloat16* tokens = nullptr;
  int64_t capacity = 0;
  int n_tokens = 0;
  int split = 1;  // CTAs of a cluster, which share a tile's columns
  int n_stages = 0;
  int weights_at = 0;  // of shared memory, behind the token tiles; then the barriers
  int weights_stride = 0;
  int barriers_at = 0;
  // Rows of a linear of two that are interleaved, all rows otherwise.
  int n_rows = 0;
  bool is_interleaved = false;
  LowBitOutput output = LowBitOutput::kStore;
  const float* bias = nullptr;
  float* y_float = nullptr;
  __nv_bfloat16* y_bf16 = nullptr;
  int64_t y_stride = 0;
  bool has_quads = false;  // four of y_float, from a multiple of four on, are 16 aligned bytes
  __nv_bfloat16* y_tiles = nullptr;
  int64_t y_capacity = 0;
};

struct LaunchPlan {
  KernelParams params;
  bool has_fractions = false;  // zeros may have them
  LowBitGemmTuning wanted;
  int device = 0;
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

#ifdef WALSH_HAS_WGMMA

__device__ __forceinline__ __nv_bfloat162 AsPair(uint32_t bits) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}
__device__ __forceinline__ uint32_t AsBits(__nv_bfloat162 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ __nv_bfloat162 Twice(float v) { return __float2bfloat162_rn(v); }

// Two numbers below 128 in the low bits of a word's halves, as bf16 of 128 and more: their bits are
// the mantissa's.
constexpr float kCodeBias = 128.0f;
__device__ __forceinline__ uint32_t BiasedCodes(uint32_t word, uint32_t mask) {
  uint32_t codes;  // (word & masks) | 0x43004300, which the compiler makes two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;"
      : "=r"(codes)
      : "r"(word), "r"(mask * 0x00010001u), "r"(0x43004300u));
  return codes;
}

// The words of a lane that registers of a step are made of.
template <int kBits>
struct Words {
  uint32_t v[kBits == 3 ? 6 : 4];

  // Those of step s and of the steps behind it that share them; `block` of a row tile.
  static __device__ __forceinline__ bool BeginAt(int s) {
    return kBits <= 3 ? s == 0 : kBits == 4 ? s % 2 == 0 : true;
  }
  __device__ __forceinline__ void Load(const uint8_t* block, int lane, int s) {
    const int piece = kBits <= 3 ? 0 : kBits == 4 ? s / 2 : s;
    const uint4 four = *reinterpret_cast<const uint4*>(block + piece * 512 + lane * 16);
    v[0] = four.x;
    v[1] = four.y;
    v[2] = four.z;
    v[3] = four.w;
    if constexpr (kBits == 3) {
      const uint2 two = *reinterpret_cast<const uint2*>(block + 512 + lane * 8);
      v[4] = two.x;
      v[5] = two.y;
    }
  }
  // Register `a` of step s with a code in the low bits of each byte, other bits above.
  __device__ __forceinline__ uint32_t Codes(int s, int a) const {
    if constexpr (kBits == 2) return v[a] >> (2 * s);
    if constexpr (kBits == 4) return v[a] >> (s % 2 * 4);
    if constexpr (kBits == 8) return v[a];
    if constexpr (kBits == 3) {
      if (s < 2) return v[a] >> (3 * s);
      const uint32_t pair =
          a % 2 == 0 ? v[4 + a / 2] : __funnelshift_r(v[4 + a / 2], v[4 + a / 2], 4);
      if (s == 2) return pair >> 3;
      return (v[a] >> 6 & 0x03030303u) | (pair & 0x04040404u);
    }
  }
};

// How the codes of a row become what is multiplied, for a group.
//
// As weights: scale · (code − zero), rounded to bf16 but for the last of three roundings that are
// below 2^-8 of it: scale in two parts, zero as the nearest number that subtracts exactly and what
// is left of it. As steps of the grid: code − zero, exact where the zero is an integer; the sums
// are multiplied by the scale then.
template <int kBits, bool kCodebook>
struct RowGrid {
  __nv_bfloat162 zero, scale, scale_rest, offset;
  __nv_bfloat162 fraction;  // of the zero
  float factor;

  // `raw` are {scale, zero} as halves.
  __device__ __forceinline__ explicit RowGrid(uint32_t raw) {
    __half2 halves;
    memcpy(&halves, &raw, sizeof(halves));
    const float2 pair = __half22float2(halves);
    constexpr float kZeroMax = kBits == 8 ? 256.0f : 128.0f;  // 128 + zero is an integer up to 256
    constexpr float kRounder = 12582912.0f;                   // 1.5 · 2^23: sums have no fraction
    const float nearest =
        __fsub_rn(__fadd_rn(fminf(fmaxf(pair.y, -kZeroMax), kZeroMax), kRounder), kRounder);
    zero = Twice(kBits == 8 ? nearest : kCodeBias + nearest);
    scale = Twice(pair.x);
    scale_rest = Twice(pair.x - __low2float(scale));
    offset = Twice((nearest - pair.y) * pair.x);
    fraction = Twice(pair.y - nearest);
    factor = pair.x;
  }
  // Of a pair of codes, exactly as they are but for a fraction of the zero.
  __device__ __forceinline__ __nv_bfloat162 IntegerSteps(uint32_t codes) const {
    if constexpr (kBits == 8) {
      // 16 · (128 + high) − 2048, and low.
      const __nv_bfloat162 high =
          __hfma2(AsPair(BiasedCodes(codes >> 4, 0xF)), Twice(16.0f), Twice(-16.0f * kCodeBias));
      const __nv_bfloat162 low = __hsub2(AsPair(BiasedCodes(codes, 0xF)), Twice(kCodeBias));
      return __hsub2(__hadd2(high, low), zero);
    } else {
      return __hsub2(AsPair(BiasedCodes(codes, (1u << kBits) - 1)), zero);
    }
  }
  template <bool kIntegerZeros>
  __device__ __forceinline__ uint32_t Steps(uint32_t codes) const {
    const __nv_bfloat162 steps = IntegerSteps(codes);
    return AsBits(kIntegerZeros ? steps : __hsub2(steps, fraction));
  }
  __device__ __forceinline__ uint32_t Weights(uint32_t codes) const {
    const __nv_bfloat162 steps = IntegerSteps(codes);
    return AsBits(__hfma2(steps, scale, __hfma2(steps, scale_rest, offset)));
  }
};
// A table of four levels: the low bytes of them in one word, the high bytes in another.
template <>
struct RowGrid<2, true> {
  uint32_t low_bytes, high_bytes;

  __device__ __forceinline__ explicit RowGrid(uint2 raw) {
    const auto to_bf16 = [](uint32_t halves) {
      __half2 h;
      memcpy(&h, &halves, sizeof(h));
      return AsBits(__float22bfloat162_rn(__half22float2(h)));
    };
    const uint32_t first = to_bf16(raw.x);
    const uint32_t last = to_bf16(raw.y);
    low_bytes = __byte_perm(first, last, 0x6420);
    high_bytes = __byte_perm(first, last, 0x7531);
  }
  __device__ __forceinline__ uint32_t Weights(uint32_t codes) const {
    const uint32_t two = codes & 0x00030003u;
    const uint32_t adjacent = two | two >> 8;  // codes in bytes 0 and 1
    // Nibbles that select: low byte of the first, its high byte, those of the second.
    return __byte_perm(low_bytes, high_bytes, (adjacent * 0x11u & 0x3333u) | 0x4040u);
  }
};

// Of rows lane / 4 and 8 more of a row tile, in grid g of a block.
template <int kBits, bool kCodebook>
struct GridPair {
  RowGrid<kBits, kCodebook> upper, lower;

  static __device__ __forceinline__ GridPair Load(const uint8_t* block, int lane, int g) {
    const uint8_t* grid = block + ServingCodeBytes(kBits) + g * ServingGridBytes(kCodebook);
    if constexpr (kCodebook) {
      const uint4 raw = *reinterpret_cast<const uint4*>(grid + lane / 4 * 16);
      return {RowGrid<kBits, true>(make_uint2(raw.x, raw.y)),
              RowGrid<kBits, true>(make_uint2(raw.z, raw.w))};
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(grid + lane / 4 * 8);
      return {RowGrid<kBits, false>(raw.x), RowGrid<kBits, false>(raw.y)};
    }
  }
};

// The A fragments of two products of 16 columns, step s of a block: weights, or steps of their
// grids.
template <bool kSteps, bool kIntegerZeros, int kBits, bool kCodebook>
__device__ __forceinline__ void Dequantize(const Words<kBits>& words,
                                           const GridPair<kBits, kCodebook>& grids, int s,
                                           uint32_t (&a)[8]) {
  const auto of = [&](const RowGrid<kBits, kCodebook>& row, uint32_t codes) {
    if constexpr (kSteps) {
      return row.template Steps<kIntegerZeros>(codes);
    } else {
      return row.Weights(codes);
    }
  };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t upper = words.Codes(s, 2 * k);
    const uint32_t lower = words.Codes(s, 2 * k + 1);
    a[4 * k] = of(grids.upper, upper);
    a[4 * k + 1] = of(grids.lower, lower);
    a[4 * k + 2] = of(grids.upper, upper >> 8);
    a[4 * k + 3] = of(grids.lower, lower >> 8);
  }
}

// The part of the work that a CTA has.
template <typename T>
struct Share {
  int rank;  // in the cluster
  int first_tile, n_tiles;
  int first_token, n_tokens;
  int first_block, last_block;

  __device__ __forceinline__ explicit Share(const KernelParams& p) {
    rank = static_cast<int>(blockIdx.x) % p.split;
    first_tile = static_cast<int>(blockIdx.y) * T::kRowTiles;
    n_tiles = min(T::kRowTiles, p.n_row_tiles - first_tile);
    first_token = static_cast<int>(blockIdx.x) / p.split * T::kTokens;
    n_tokens = min(T::kTokens, p.n_tokens - first_token);
    first_block = p.n_blocks * rank / p.split;
    last_block = p.n_blocks * (rank + 1) / p.split;
  }
};

// A place in the ring, and how often it has been round.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Step(int n_stages) {
    if (++stage < n_stages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <typename T>
struct Ring {
  uint32_t base;  // of shared memory
  int weights_at, weights_stride, barriers_at, n_stages;

  __device__ __forceinline__ Ring(uint32_t shared, const KernelParams& p)
      : base(shared),
        weights_at(p.weights_at),
        weights_stride(p.weights_stride),
        barriers_at(p.barriers_at),
        n_stages(p.n_stages) {}
  __device__ __forceinline__ uint32_t tokens(int stage) const {
    return base + stage * T::kTokenBytes;
  }
  __device__ __forceinline__ int WeightsAt(int stage) const {
    return weights_at + stage * weights_stride;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + barriers_at + stage * 16;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
};

// By one thread: the whole part's copies.
template <typename T>
__device__ __forceinline__ void Copy(const KernelParams& p, const Share<T>& share,
                                     const Ring<T>& ring) {
  const uint64_t policy = EvictFirst();
  const auto token_rows = static_cast<uint32_t>((share.n_tokens + 7) / 8 * 8);
  const uint32_t piece_bytes = token_rows * kWgmmaRowBytes;
  const auto weight_bytes = static_cast<uint32_t>(share.n_tiles * p.block_bytes);
  const auto copy_weights = [&](int block, int stage) {
    ExpectBytes(ring.full(stage), weight_bytes + kPieces * piece_bytes);
    const uint8_t* from =
        p.weights +
        (static_cast<int64_t>(block) * p.n_row_tiles + share.first_tile) * p.block_bytes;
    const uint32_t to = ring.base + ring.WeightsAt(stage);
    // Others read them, too, where there are many tokens.
    if (p.n_tokens <= T::kTokens) {
      CopyBulkOnce(to, from, weight_bytes, ring.full(stage), policy);
    } else {
      CopyBulk(to, from, weight_bytes, ring.full(stage));
    }
  };
  const auto copy_tokens = [&](int block, int stage) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const __nv_bfloat16* from =
          p.tokens +
          ((static_cast<int64_t>(block) * kPieces + piece) * p.capacity + share.first_token) *
              kTilePieceCols;
      CopyBulk(ring.tokens(stage) + piece * T::kPieceBytes, from, piece_bytes, ring.full(stage));
    }
  };
  // Weights need not wait for the kernel before.
  const int n_blocks = share.last_block - share.first_block;
  const int n_ahead = min(n_blocks, ring.n_stages);
  for (int i = 0; i < n_ahead; ++i) copy_weights(share.first_block + i, i);
  WaitForPreviousKernel();
  for (int i = 0; i < n_ahead; ++i) copy_tokens(share.first_block + i, i);
  RingPlace place;
  for (int i = n_ahead; i < n_blocks; ++i) {
    WaitBarrier(ring.empty(place.stage), place.parity);
    copy_weights(share.first_block + i, place.stage);
    copy_tokens(share.first_block + i, place.stage);
    place.Step(ring.n_stages);
  }
}

template <typename T>
struct Accumulators {
  float v[T::kTokens / 2];
};

template <int kBits, bool kCodebook, bool kIntegerZeros, typename T>
__device__ __forceinline__ void Multiply(const KernelParams& p, const Share<T>& share,
                                         const Ring<T>& ring, const uint8_t* shared,
                                         Accumulators<T>& acc) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int steps_of_grid = kServingSteps / p.grids;
  // Where there are few sums, they are multiplied by the scale of their group, not the weights.
  constexpr bool kSteps = T::kSumsAreScaled && !kCodebook;
  Accumulators<T> of_group;  // kSteps: steps · activations
  float upper_factor = 0;
  float lower_factor = 0;
  const auto end_group = [&] {
    WaitForProducts<0>();
    PinRegisters(of_group.v);
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; i += 4) {
      acc.v[i] = __fmaf_rn(upper_factor, of_group.v[i], acc.v[i]);
      acc.v[i + 1] = __fmaf_rn(upper_factor, of_group.v[i + 1], acc.v[i + 1]);
      acc.v[i + 2] = __fmaf_rn(lower_factor, of_group.v[i + 2], acc.v[i + 2]);
      acc.v[i + 3] = __fmaf_rn(lower_factor, of_group.v[i + 3], acc.v[i + 3]);
    }
  };
  uint32_t a[2][8];
  Words<kBits> words;
  RingPlace place;
  int previous = -1;
  int block = share.first_block;
  do {  // there is at least one
    WaitBarrier(ring.full(place.stage), place.parity);
    const uint8_t* weights = shared + ring.WeightsAt(place.stage) + warp * p.block_bytes;
    const uint64_t rows = DescribeRows(ring.tokens(place.stage));
    GridPair<kBits, kCodebook> grids = GridPair<kBits, kCodebook>::Load(weights, lane, 0);
#pragma unroll
    for (int s = 0; s < kServingSteps; ++s) {
      const bool begins_group = (s & (steps_of_grid - 1)) == 0;
      if (Words<kBits>::BeginAt(s)) words.Load(weights, lane, s);
      if (s > 0 && begins_group) {
        grids = GridPair<kBits, kCodebook>::Load(weights, lane, s / steps_of_grid);
      }
      Dequantize<kSteps, kIntegerZeros>(words, grids, s, a[s % 2]);
      if constexpr (kSteps) {
        if (begins_group) {
          if (s > 0 || previous >= 0) end_group();
          upper_factor = grids.upper.factor;
          lower_factor = grids.lower.factor;
        }
      }
      PinRegisters(a[s % 2]);
      BeginProducts();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int column = 32 * s + 16 * k;
        const uint64_t b =
            Advance(rows, column / kTilePieceCols * T::kPieceBytes + column % kTilePieceCols * 2);
        if constexpr (kSteps) {
          MultiplyAdd(of_group.v, a[s % 2] + 4 * k, b, !(begins_group && k == 0));
        } else {
          MultiplyAdd(acc.v, a[s % 2] + 4 * k, b, true);
        }
      }
      CommitProducts();
      WaitForProducts<1>();  // those of the step before, whose registers come next
      if (s == 0 && previous >= 0) Arrive(ring.empty(previous));
    }
    previous = place.stage;
    place.Step(ring.n_stages);
  } while (++block < share.last_block);
  if constexpr (kSteps) {
    end_group();
  } else {
    WaitForProducts<0>();
    PinRegisters(acc.v);
  }
}

// Rows that a warp writes at once.
inline constexpr int kWrittenRows = 4 * kWarpSize;

// The sums of rows first_row + 4 lane to 3 more, of a token.
__device__ __forceinline__ void WriteToken(const KernelParams& p, int64_t token, int first_row,
                                           int lane, float4 v) {
  const auto write = [&](int64_t col, int n, float4 y) {
    const int64_t at = token * p.y_stride + col;
    const float values[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= n) break;
      if (p.y_bf16 != nullptr) {
        p.y_bf16[at + i] = __float2bfloat16_rn(values[i]);
      } else {
        p.y_float[at + i] =
            p.output == LowBitOutput::kAdd ? p.y_float[at + i] + values[i] : values[i];
      }
    }
  };
  const auto with_bias = [&](float4 y, int64_t row, int n) {
    if (p.bias == nullptr) return y;
    const float* bias = p.bias + row;
    return make_float4(y.x + (n > 0 ? bias[0] : 0), y.y + (n > 1 ? bias[1] : 0),
                       y.z + (n > 2 ? bias[2] : 0), y.w + (n > 3 ? bias[3] : 0));
  };
  if (!p.is_interleaved) {
    const int row = first_row + 4 * lane;
    const int n = min(p.n_rows - row, 4);
    if (n <= 0) return;
    const float4 y = with_bias(v, row, n);
    const int64_t at = token * p.y_stride + row;
    if (n < 4 || !p.has_quads) return write(row, n, y);
    auto* const to = reinterpret_cast<float4*>(p.y_float + at);
    if (p.output == LowBitOutput::kAdd) {
      const float4 old = *to;
      *to = make_float4(old.x + y.x, old.y + y.y, old.z + y.z, old.w + y.w);
    } else {
      *to = y;
    }
    return;
  }
  // Of a tile's 16 rows lanes 0 and 1 of four have the first linear's, lanes 2 and 3 the second's.
  const float4 other = make_float4(__shfl_xor_sync(~0u, v.x, 2), __shfl_xor_sync(~0u, v.y, 2),
                                   __shfl_xor_sync(~0u, v.z, 2), __shfl_xor_sync(~0u, v.w, 2));
  const int row = first_row / 2 + lane / 4 * 8 + lane % 2 * 4;
  const int n = min(p.n_rows - row, 4);
  const bool is_second = lane % 4 >= 2;
  if (!IsOfPairs(p.output)) {
    if (n > 0) {
      const int64_t col = row + (is_second ? p.n_rows : 0);
      write(col, n, with_bias(v, col, n));
    }
    return;
  }
  if (is_second) return;
  const float4 gate = with_bias(v, row, n);
  const float4 up = with_bias(other, row + p.n_rows, n);
  const auto unit = [&](float g, float u) {
    return (p.output == LowBitOutput::kSiluMul ? Silu(g) : Gelu(g)) * u;
  };
  float4 y =
      make_float4(unit(gate.x, up.x), unit(gate.y, up.y), unit(gate.z, up.z), unit(gate.w, up.w));
  if (p.y_tiles == nullptr) {
    if (n > 0) write(row, n, y);
    return;
  }
  // Zeros behind the last column.
  if (n < 4) y.w = 0;
  if (n < 3) y.z = 0;
  if (n < 2) y.y = 0;
  if (n < 1) y.x = 0;
  StoreFour(p.y_tiles, p.y_capacity, token, row, y);
}

template <typename T>
__device__ __forceinline__ void StoreSums(const Accumulators<T>& acc, float* sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float* const to = sums + lane % 4 * 2 * T::kSumsStride + warp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < T::kTokens / 8; ++i) {
    float* const at = to + 8 * i * T::kSumsStride;
    at[0] = acc.v[4 * i];
    at[T::kSumsStride] = acc.v[4 * i + 1];
    at[8] = acc.v[4 * i + 2];
    at[T::kSumsStride + 8] = acc.v[4 * i + 3];
  }
}
__device__ __forceinline__ float4 LoadOfCta(const float* p, int rank) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(AddressInCta(p, rank)));
  return v;
}

// The CTA's outputs, of the tokens that it adds up.
template <typename T>
__device__ __forceinline__ void WriteSums(const KernelParams& p, const Share<T>& share,
                                          const float* sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first = share.n_tokens * share.rank / p.split;
  const int last = share.n_tokens * (share.rank + 1) / p.split;
  for (int t = first + warp; t < last; t += T::kMultiplyWarps) {
    for (int row = 0; row < share.n_tiles * kServingTileRows; row += kWrittenRows) {
      const float* const from = sums + t * T::kSumsStride + row + 4 * lane;
      float4 v;
      if (p.split == 1) {
        v = *reinterpret_cast<const float4*>(from);
      } else {
        v = LoadOfCta(from, 0);
        for (int rank = 1; rank < p.split; ++rank) {
          const float4 other = LoadOfCta(from, rank);
          v = make_float4(v.x + other.x, v.y + other.y, v.z + other.z, v.w + other.w);
        }
      }
      WriteToken(p, share.first_token + t, share.first_tile * kServingTileRows + row, lane, v);
    }
  }
}

// All threads that multiply.
template <typename T>
__device__ __forceinline__ void SyncMultipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(T::kMultiplyThreads) : "memory");
}

#endif  // WALSH_HAS_WGMMA

template <int kBits, bool kCodebook, bool kIntegerZeros, typename T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm)
    LowBitGemmKernel(const __grid_constant__ KernelParams p) {
#ifdef WALSH_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const Share<T> share(p);
  const Ring<T> ring(SharedAddress(shared), p);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < ring.n_stages; ++stage) {
      InitBarrier(ring.full(stage));
      InitBarrier(ring.empty(stage), T::kMultiplyThreads);
    }
    FenceBarriers();
  }
  LetNextKernelStart();
  __syncthreads();

  if (warp >= T::kMultiplyWarps) {
    if constexpr (T::kMovesRegisters) LowerRegisters<T::kCopyRegisters>();
    if (warp == T::kMultiplyWarps && IsElected()) Copy<T>(p, share, ring);
    __syncwarp();
    if (p.split > 1) {
      SyncCluster();
      SyncCluster();
    }
  } else {
    if constexpr (T::kMovesRegisters) RaiseRegisters<T::kMultiplyRegisters>();
    Accumulators<T> acc{};
    Multiply<kBits, kCodebook, kIntegerZeros>(p, share, ring, shared, acc);
    // All have multiplied, so all copies are there and read: the ring becomes the sums' place.
    SyncMultipliers<T>();
    auto* const sums = reinterpret_cast<float*>(shared);
    StoreSums(acc, sums);
    WaitForPreviousKernel();
    if (p.split > 1) {
      SyncCluster();
    } else {
      SyncMultipliers<T>();
    }
    WriteSums(p, share, sums);
    if (p.split > 1) SyncCluster();  // none leaves while others read its sums
  }
#endif
}

// How a kernel is launched.
struct Cut {
  double us = std::numeric_limits<double>::infinity();  // that it may take
  absl::Status (*launch)(const LaunchPlan& plan, int split) = nullptr;
  int split = 0;
};

constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

template <int kBits, bool kCodebook, bool kIntegerZeros, typename T>
class Launcher {
 public:
  static absl::Status Launch(const LaunchPlan& plan, int split) {
    KernelParams p = plan.params;
    p.split = split;
    const int shared_bytes = PlaceShared(p);
    return LaunchKernel("LowBitGemm", kKernel,
                        {.grid = dim3(static_cast<unsigned>(NumTokenTiles(p) * split),
                                      static_cast<unsigned>(RowGroups(p))),
                         .threads = T::kThreads,
                         .shared_bytes = shared_bytes,
                         .cluster = split,
                         .overlap_previous = plan.overlap_previous,
                         .stream = plan.stream},
                        p);
  }

  // Makes `best` the best cut of this tile if it is better.
  static absl::Status Consider(const LaunchPlan& plan, Cut& best) {
    if (plan.wanted.tile_tokens != 0 && plan.wanted.tile_tokens != T::kTokens) {
      return absl::OkStatus();
    }
    const KernelParams& p = plan.params;
    for (int split = 1; split <= std::min(kSplitMax, p.n_blocks); ++split) {
      if (plan.wanted.split != 0 && plan.wanted.split != split) continue;
      WALSH_ASSIGN_OR_RETURN(const int at_once, CtasAtOnce(plan.device, split));
      if (at_once == 0) continue;
      // Fitted to what was measured on an H200 (docs/results); it need only order the cuts.
      constexpr double kCtaUs = 5;     // to begin and to end
      constexpr double kPartUs = 0.3;  // another CTA's sums
      const double ctas = static_cast<double>(NumTokenTiles(p)) * RowGroups(p) * split;
      const double us = std::ceil(ctas / at_once) *
                        (CeilDiv(p.n_blocks, split) * T::kBlockUs + kCtaUs + kPartUs * split);
      if (us < best.us) best = {.us = us, .launch = Launch, .split = split};
    }
    return absl::OkStatus();
  }

 private:
  static constexpr auto kKernel = LowBitGemmKernel<kBits, kCodebook, kIntegerZeros, T>;

  static int RowGroups(const KernelParams& p) { return CeilDiv(p.n_row_tiles, T::kRowTiles); }
  static int NumTokenTiles(const KernelParams& p) { return CeilDiv(p.n_tokens, T::kTokens); }

  static constexpr int kBarrierBytes = 16;  // full and empty
  // Shared memory of a CTA, at most.
  static constexpr int kSharedBudget =
      (kSharedMax + kSharedReserved) / T::kCtasPerSm - kSharedReserved;
  static_assert(T::kSumsBytes + kStagesMax * kBarrierBytes <= kSharedBudget);

  // Returns the bytes of a CTA.
  static int PlaceShared(KernelParams& p) {
    p.weights_stride = T::WeightBytes(p.block_bytes);
    const int stage_bytes = T::kTokenBytes + p.weights_stride;
    p.n_stages = std::min((kSharedBudget - kStagesMax * kBarrierBytes) / stage_bytes, kStagesMax);
    p.weights_at = p.n_stages * T::kTokenBytes;
    p.barriers_at = std::max(p.n_stages * stage_bytes, T::kSumsBytes);
    return p.barriers_at + p.n_stages * kBarrierBytes;
  }

  // CTAs that the device runs at once, in clusters of `split`, which not all multiprocessors have
  // room for; 0 where it takes no such cluster. Asked for once, and the same for all matrices: the
  // cut, and with it the bits of a result, must not depend on which came first.
  static absl::StatusOr<int> CtasAtOnce(int device, int split) {
    static std::atomic<int> known[kDevicesMax][kSplitMax];  // and 1; 0: not asked yet
    std::atomic<int>& slot = known[device % kDevicesMax][split - 1];
    if (const int n = slot.load(std::memory_order_relaxed); n > 0) return n - 1;
    WALSH_RETURN_IF_ERROR(PrepareOnce<kKernel>(kSharedMax));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(split), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(split));
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = kSharedBudget;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
    if (error == cudaErrorInvalidClusterSize) {
      cudaGetLastError();  // is not for others to find
    } else {
      WALSH_CUDA_RETURN_IF_ERROR(error);
    }
    slot.store(clusters * split + 1, std::memory_order_relaxed);
    return clusters * split;
  }
};

template <int kBits, bool kCodebook, bool kIntegerZeros>
absl::Status LaunchBest(const LaunchPlan& plan) {
  Cut best;
  absl::Status status;
  const auto consider = [&]<int kTokens>() {
    using Tiled = Launcher<kBits, kCodebook, kIntegerZeros, Tile<kTokens>>;
    status.Update(Tiled::Consider(plan, best));
  };
  consider.template operator()<16>();
  consider.template operator()<32>();
  consider.template operator()<64>();
  consider.template operator()<128>();
  consider.template operator()<256>();
  WALSH_RETURN_IF_ERROR(status);
  if (best.launch != nullptr) return best.launch(plan, best.split);
  if (plan.wanted.tile_tokens == 0 && plan.wanted.split == 0) {
    return absl::UnimplementedError("LowBitGemm: the device runs no CTA of it");
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "LowBitGemm: tuning of ", plan.wanted.tile_tokens, " tokens (16, 32, 64, 128 or 256) and ",
      plan.wanted.split, " parts (1 to ", std::min(kSplitMax, plan.params.n_blocks), ")"));
}

template <int kBits, bool kCodebook>
absl::Status LaunchWidth(const LaunchPlan& plan) {
  if constexpr (!kCodebook) {
    if (plan.has_fractions) return LaunchBest<kBits, kCodebook, false>(plan);
  }
  return LaunchBest<kBits, kCodebook, true>(plan);
}

// Each in a file of its own, low_bit_gemm_*.cu.
absl::Status Launch2(const LaunchPlan& plan);
absl::Status Launch3(const LaunchPlan& plan);
absl::Status Launch4(const LaunchPlan& plan);
absl::Status Launch8(const LaunchPlan& plan);
absl::Status LaunchCodebook(const LaunchPlan& plan);

}  // namespace walsh::kernels::cuda::low_bit_gemm
