// The kernel of LowBitMatmul (worker/kernels/cuda/low_bit_matmul.h) and its launch, for one width
// in each file that includes this.
//
// The warps of a CTA take groups of 16 · kRowTiles rows and 8 · kTokenTiles tokens. They have the
// same rows and share the columns, block by block; each warp runs on its own until a group of rows
// is done. Weights and activations travel by cp.async into a ring of kStages blocks for each warp,
// the next ones while the present are multiplied, over the ends of groups of rows too. Activations
// come from the L2: each is used by one warp of the CTA only, so that there is nothing to share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/serving_codes.h"

namespace walsh::kernels::cuda::low_bit {

inline constexpr int kTokenBytes = kServingBlockCols * 2;  // of a token in a block
inline constexpr int kPieceBytes = kTokenBytes / 4;        // of 32 columns, which are two steps

struct KernelParams {
  const uint8_t* codes;
  const uint8_t* grids;
  int n_row_tiles;
  int n_blocks;  // of columns
  int n_grids;   // of a row tile
  int blocks_of_grid;
  int n_row_groups;
  const __nv_bfloat16* x;
  int64_t x_stride;
  int cols;
  int n_tokens;
  // Rows of a linear of two that are interleaved, all rows otherwise.
  int n_rows;
  bool is_interleaved;
  LowBitOutput output;
  const float* bias;
  float* y_float;
  __nv_bfloat16* y_bf16;
  int64_t y_stride;
};

// What a kernel is compiled for.
template <int kBits_, bool kCodebook_, int kGrids_, int kTokenTiles_, int kRowTiles_, int kWarps_>
struct Form {
  static constexpr int kBits = kBits_;
  static constexpr bool kCodebook = kCodebook_;
  static constexpr int kGrids = kGrids_;  // of a block of columns: 1, 2 or 4
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarps = kWarps_;

  static constexpr int kThreads = kWarps * 32;
  static constexpr int kPlanes = kCodebook ? 3 : 1;
  static constexpr int kRows = kRowTiles * kServingTileRows;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kGridBytes = kServingTileRows * (kCodebook ? 8 : 4);
  static constexpr int kCodeBytes = kRowTiles * ServingBlockBytes(kBits);
  static constexpr int kWeightBytes = kCodeBytes + kRowTiles * kGrids * kGridBytes;
  static constexpr int kRingBytes = 5632;
  static constexpr int kStagesMax = kTokenTiles == 1 && kWarps == 8 ? 4 : 2;
  static constexpr int kStages = std::clamp(kRingBytes / kWeightBytes, 2, kStagesMax);
  // Rows of a warp's sums, one for each token: fragments are written without bank conflicts.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kRegisterRows = kPlanes * kRowTiles * kTokenTiles;
  static constexpr int kWarpsMin = kTokenTiles == 1 && kRegisterRows <= 2 ? 32
                                   : kRegisterRows <= 4                   ? 16
                                                                          : 8;
  static constexpr int kCtasMin = std::max(kWarpsMin / kWarps, 1);

  // With two copies of the warps' sums one barrier for a group of rows is enough. Sixteen warps of
  // many tokens share eight places instead.
  static constexpr int kSumCopies = kTokenTiles * kWarps <= 16 ? 2 : 1;
  static constexpr int kSumPlaces = kSumCopies == 1 ? 8 : kWarps;

  static __host__ __device__ constexpr int StageBytes(int n_tokens) {
    return kWeightBytes + n_tokens * kTokenBytes;
  }
  static __host__ __device__ constexpr int SumFloats(int n_tokens) { return n_tokens * kSumStride; }
  static __host__ __device__ constexpr int SharedBytes(int n_tokens) {
    return kWarps * kStages * StageBytes(n_tokens) +
           kSumCopies * kSumPlaces * SumFloats(n_tokens) * static_cast<int>(sizeof(float));
  }
};

// bf16 bits of 2^(7 − p), both halves: what a code at bit p is set into.
__host__ __device__ constexpr uint32_t ExponentAt(int p) {
  return (0x4300u - static_cast<uint32_t>(p) * 0x80u) * 0x10001u;
}
inline constexpr uint32_t kOnes = 0x3F803F80u;

// Bits [p, p + n) of both halves.
__host__ __device__ constexpr uint32_t FieldMask(int p, int n) {
  return (((1u << n) - 1u) << p) * 0x10001u;
}

// (x & mask) | set: one instruction.
__device__ __forceinline__ uint32_t Select(uint32_t x, uint32_t mask, uint32_t set) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(set));
  return y;
}

__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// Offsets of registers 0 and 1 (pair 0) or 2 and 3 of step s.
template <int kBits>
__device__ __forceinline__ constexpr uint32_t OffsetOf(int s, int pair) {
  if (kBits == 2) {
    if (s % 2 == 0) return ExponentAt(pair == 0 ? 0 : 2);
    return ExponentAt(pair == 0 ? 4 : s % 4 == 1 ? 0 : 2);
  }
  if (kBits == 3) {
    if (s < 6) return ExponentAt(pair == 0 ? 0 : 3);
    if (s == 6) return ExponentAt(pair);
    return ExponentAt(pair == 0 ? 2 : 3);
  }
  if (kBits == 4) return ExponentAt(0);
  return 0x43C043C0u;  // 128 + 256, of the two nibbles
}

// The four registers of step s from the words of 2 bits; kMask is 3 for the codes, 1 and 2 for one
// of their bits (the upper one counts 2).
template <uint32_t kMask>
__device__ __forceinline__ void Expand2(const uint32_t* words, int s, uint32_t (&a)[4]) {
  constexpr uint32_t kAt0 = kMask * 0x10001u;
  const uint32_t first = words[s / 4 * 2];
  const uint32_t word = words[s / 4 * 2 + s % 4 / 2];
  const uint32_t next = word >> 6;
  if (s % 2 == 0) {
    a[0] = Select(word, kAt0, ExponentAt(0));
    a[1] = Select(next, kAt0, ExponentAt(0));
    a[2] = Select(word, kAt0 << 2, ExponentAt(2));
    a[3] = Select(next, kAt0 << 2, ExponentAt(2));
    return;
  }
  const uint32_t second = words[s / 4 * 2 + 1];
  a[0] = Select(word, kAt0 << 4, ExponentAt(4));
  a[1] = Select(next, kAt0 << 4, ExponentAt(4));
  const int p = s % 4 == 1 ? 0 : 2;
  a[2] = Select(first >> 12, kAt0 << p, ExponentAt(p));
  a[3] = Select(second >> 12, kAt0 << p, ExponentAt(p));
}

__device__ __forceinline__ void Expand3(const uint32_t* words, int s, uint32_t (&a)[4]) {
  if (s < 6) {
    const uint32_t next = words[s] >> 6;
    a[0] = Select(words[s], FieldMask(0, 3), ExponentAt(0));
    a[1] = Select(next, FieldMask(0, 3), ExponentAt(0));
    a[2] = Select(words[s], FieldMask(3, 3), ExponentAt(3));
    a[3] = Select(next, FieldMask(3, 3), ExponentAt(3));
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t w0 = words[3 * i] >> 12;
    const uint32_t w1 = words[3 * i + 1] >> 11;
    const uint32_t w2 = words[3 * i + 2] >> 10;
    if (s == 6) {
      a[i] = Select(w0, FieldMask(0, 3), ExponentAt(0));
      a[2 + i] = Select(w1, FieldMask(1, 3), ExponentAt(1));
    } else {
      a[i] = Select(w2, FieldMask(2, 3), ExponentAt(2));
      a[2 + i] = Select(w0, FieldMask(3, 1), ExponentAt(3));
      a[2 + i] = Select(w1, FieldMask(4, 1), a[2 + i]);
      a[2 + i] = Select(w2, FieldMask(5, 1), a[2 + i]);
    }
  }
}

__device__ __forceinline__ void Expand4(const uint32_t* words, int s, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = Select(words[s] >> (4 * i), FieldMask(0, 4), ExponentAt(0));
}

// 128 + the low nibbles, 256 + 16 · the high ones.
__device__ __forceinline__ void Expand8(const uint32_t* words, int s, uint32_t (&low)[4],
                                        uint32_t (&high)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = words[2 * s + i / 2];
    low[i] = Select(word >> (i % 2 * 8), FieldMask(0, 4), ExponentAt(0));
    high[i] = Select(word >> (i % 2 * 8 + 1), FieldMask(3, 4), 0x43804380u);
  }
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Weights are read once: they shall not push activations out of the L2.
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void Copy16(uint32_t to, const uint8_t* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}
__device__ __forceinline__ void Copy8(uint32_t to, const uint8_t* from, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}

// Zeros where there is nothing.
__device__ __forceinline__ void Copy16OrZero(uint32_t to, const __nv_bfloat16* from,
                                             bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(is_there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What a warp copies next: its blocks of a group of rows, then those of its CTA's next group, with
// the activations of the same columns. A stage holds the codes of each row tile, the grids of each,
// and the activations of each token, 16 pieces of 8 columns; those of odd tokens are swapped by
// fours, so that the lanes of a fragment read different banks.
template <typename F>
class Stream {
 public:
  // A warp beyond the last block has nothing to do.
  __device__ __forceinline__ Stream(const KernelParams& p, int lane, int warp, int token_first)
      : lane_(lane),
        first_block_(warp),
        row_group_(warp < p.n_blocks ? static_cast<int>(blockIdx.x) : p.n_row_groups),
        n_tokens_(min(p.n_tokens - token_first, F::kTokens)),
        policy_(EvictFirst()),
        x_first_(p.x + (token_first + lane / 16) * p.x_stride + lane % 16 * 8),
        x_place_(F::kWeightBytes + lane / 16 * kTokenBytes + (lane % 16 ^ lane / 16 * 4) * 16) {
    if (has_next(p)) BeginRows(p);
  }

  __device__ __forceinline__ bool has_next(const KernelParams& p) const {
    return row_group_ < p.n_row_groups;
  }
  __device__ __forceinline__ int block() const { return block_; }

  __device__ __forceinline__ void CopyWeights(const KernelParams& p, uint32_t stage) const {
#pragma unroll
    for (int r = 0; r < F::kRowTiles; ++r) {
      const uint8_t* from =
          codes_ + static_cast<uint64_t>(TileBytes(p)) * static_cast<uint32_t>(min(r, last_tile_));
      const uint32_t to = stage + r * kBlockBytes;
#pragma unroll
      for (int i = 0; i < kBlockBytes / 512; ++i) {
        Copy16(to + i * 512 + lane_ * 16, from + i * 512, policy_);
      }
      if (F::kBits == 3) Copy8(to + 512 + lane_ * 8, from + 512 - lane_ * 8, policy_);
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = c * 32 + lane_;
      if (i < kGridPieces) Copy16(stage + F::kCodeBytes + i * 16, grids_[c], policy_);
    }
  }

  // Of any block, for the blocks whose weights were on their way before there were activations.
  __device__ __forceinline__ void CopyActivations(const KernelParams& p, int block,
                                                  uint32_t stage) const {
    const __nv_bfloat16* from = x_first_ + block * kServingBlockCols;
    const bool is_there = block * kServingBlockCols + lane_ % 16 * 8 < p.cols;
    const uint32_t to = stage + x_place_;
    // Most often there is one token.
    if (F::kTokenTiles == 1 && n_tokens_ <= 2) {
      if (lane_ / 16 < n_tokens_) Copy16OrZero(to, from, is_there);
      return;
    }
#pragma unroll
    for (int i = 0; i < F::kTokens / 2; ++i) {
      if (2 * i + lane_ / 16 < n_tokens_) Copy16OrZero(to + i * 2 * kTokenBytes, from, is_there);
      from += 2 * p.x_stride;
    }
  }

  __device__ __forceinline__ void Advance(const KernelParams& p) {
    block_ += F::kWarps;
    if (block_ < p.n_blocks) {
      codes_ += F::kWarps * kBlockBytes;
      if (p.blocks_of_grid == 1) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) grids_[c] += F::kWarps * F::kGrids * F::kGridBytes;
      } else {
        BeginGrids(p);
      }
      return;
    }
    row_group_ += static_cast<int>(gridDim.x);
    if (has_next(p)) BeginRows(p);
  }

 private:
  static constexpr int kBlockBytes = ServingBlockBytes(F::kBits);
  // The grids of a tile and block are adjacent: pieces of 16 bytes, a lane each.
  static constexpr int kPiecesOfTile = F::kGrids * F::kGridBytes / 16;
  static constexpr int kGridPieces = F::kRowTiles * kPiecesOfTile;
  static constexpr int kChunks = (kGridPieces + 31) / 32;

  static __device__ __forceinline__ uint32_t TileBytes(const KernelParams& p) {
    return static_cast<uint32_t>(p.n_blocks) * kBlockBytes;
  }
  __device__ __forceinline__ void BeginRows(const KernelParams& p) {
    block_ = first_block_;
    const int tile = row_group_ * F::kRowTiles;
    last_tile_ = min(F::kRowTiles, p.n_row_tiles - tile) - 1;
    codes_ =
        p.codes + (static_cast<int64_t>(tile) * p.n_blocks + block_) * kBlockBytes + lane_ * 16;
    BeginGrids(p);
  }
  __device__ __forceinline__ void BeginGrids(const KernelParams& p) {
    const int grid = p.blocks_of_grid == 1 ? block_ * F::kGrids : block_ / p.blocks_of_grid;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = c * 32 + lane_;
      const int tile = row_group_ * F::kRowTiles + min(i / kPiecesOfTile, last_tile_);
      grids_[c] = p.grids + (static_cast<int64_t>(tile) * p.n_grids + grid) * F::kGridBytes +
                  i % kPiecesOfTile * 16;
    }
  }

  const int lane_;
  const int first_block_;
  int row_group_;
  const int n_tokens_;
  const uint64_t policy_;
  const __nv_bfloat16* const x_first_;
  const int x_place_;
  int block_ = 0;
  int last_tile_ = 0;  // of the group of rows
  const uint8_t* codes_ = nullptr;
  const uint8_t* grids_[kChunks];
};

__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 LoadShared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 HalvesToFloats(uint32_t halves) {
  __half2 h;
  memcpy(&h, &halves, sizeof(h));
  return __half22float2(h);
}

// total += grid · (sums of a group), for rows i (h = 0) and i + 8 of a tile; two tokens each.
// sums: {Σ offset x, the same for the next token, Σ x, …}.
template <typename F>
__device__ __forceinline__ void AddGroup(uint32_t grid, int lane,
                                         const float (&acc)[F::kPlanes][F::kTokenTiles][4],
                                         const float (&sums)[F::kTokenTiles][4],
                                         float (&total)[F::kTokenTiles][4]) {
  if constexpr (F::kCodebook) {
    const uint4 levels = LoadShared16(grid + lane / 4 * 16);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 low = HalvesToFloats(h == 0 ? levels.x : levels.z);
      const float2 high = HalvesToFloats(h == 0 ? levels.y : levels.w);
      const float b = low.y - low.x;
      const float d = high.x - low.x;
      const float e = (high.y - high.x) - b;
#pragma unroll
      for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float offset = sums[n][c];
          float& y = total[n][2 * h + c];
          y = __fmaf_rn(low.x, sums[n][2 + c], y);
          y = __fmaf_rn(b, __fsub_rn(acc[0][n][2 * h + c], offset), y);
          y = __fmaf_rn(0.5f * d, __fsub_rn(acc[1][n][2 * h + c], offset), y);
          y = __fmaf_rn(e, __fsub_rn(acc[2][n][2 * h + c], offset), y);
        }
      }
    }
  } else {
    const uint2 pairs = LoadShared8(grid + lane / 4 * 8);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 pair = HalvesToFloats(h == 0 ? pairs.x : pairs.y);
#pragma unroll
      for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float sum = __fsub_rn(acc[0][n][2 * h + c], sums[n][c]);
          sum = __fmaf_rn(-pair.y, sums[n][2 + c], sum);
          total[n][2 * h + c] = __fmaf_rn(pair.x, sum, total[n][2 * h + c]);
        }
      }
    }
  }
}

// Words that a lane holds of a row tile: all of a block at 2 and 3 bits, 16 bytes otherwise.
template <typename F>
inline constexpr int kWordsHeld = F::kBits == 3 ? 6 : 4;

template <typename F>
__device__ __forceinline__ void LoadWords(uint32_t block, int lane, int s,
                                          uint32_t (&words)[kWordsHeld<F>]) {
  constexpr int kStepsOfPiece = F::kBits <= 3 ? 8 : 16 / F::kBits;
  if (s % kStepsOfPiece != 0) return;
  const uint4 v = LoadShared16(block + s / kStepsOfPiece * 512 + lane * 16);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
  if constexpr (F::kBits == 3) {
    const uint2 rest = LoadShared8(block + 512 + lane * 8);
    words[4] = rest.x;
    words[5] = rest.y;
  }
}

// acc[plane][token tile] += a row tile's weights of step s times the activations b.
template <typename F>
__device__ __forceinline__ void MultiplyStep(const uint32_t (&words)[kWordsHeld<F>], int s,
                                             const uint32_t (&b)[F::kTokenTiles][2],
                                             float (&acc)[F::kPlanes][F::kTokenTiles][4]) {
  uint32_t a[F::kBits == 8 ? 2 : F::kPlanes][4];
  if constexpr (F::kCodebook) {
    uint32_t both[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) both[i] = words[i] & words[i] >> 1;
    Expand2<1>(words, s, a[0]);
    Expand2<2>(words, s, a[1]);
    Expand2<1>(both, s, a[2]);
  } else if constexpr (F::kBits == 2) {
    Expand2<3>(words, s, a[0]);
  } else if constexpr (F::kBits == 3) {
    Expand3(words, s, a[0]);
  } else if constexpr (F::kBits == 4) {
    Expand4(words, s % 4, a[0]);
  } else {
    Expand8(words, s % 2, a[0], a[1]);
  }
#pragma unroll
  for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane) {
      Mma(acc[plane][n], a[plane], b[n][0], b[n][1], acc[plane][n]);
    }
    if constexpr (F::kBits == 8) Mma(acc[0][n], a[1], b[n][0], b[n][1], acc[0][n]);
  }
}

// What a CTA does with its warps' sums of a group of rows: adds them up, warps 0, 1, …, 7, each of
// sixteen after the addition of the one eight later, and writes. A thread takes an output.
template <typename F>
__device__ __forceinline__ void Finish(const KernelParams& p, int row_group, int token_first,
                                       int n_tokens, const float* sums) {
  const int warp_stride = F::SumFloats(n_tokens);
  const auto value_of = [&](int row, int token) {
    const float* at = sums + token * F::kSumStride + row;
    float of_place[F::kSumPlaces];
#pragma unroll
    for (int w = 0; w < F::kSumPlaces; ++w) of_place[w] = at[w * warp_stride];
    float sum = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w)
      sum += F::kSumPlaces == 16 ? of_place[w] + of_place[(w + 8) % F::kSumPlaces] : of_place[w];
    return sum;
  };
  const auto store = [&](int token, int row, float v) {
    const int64_t at = (token_first + token) * p.y_stride + row;
    if (p.y_bf16 != nullptr) {
      p.y_bf16[at] = __float2bfloat16_rn(v);
    } else {
      p.y_float[at] = p.output == LowBitOutput::kAdd ? p.y_float[at] + v : v;
    }
  };
  if (p.output == LowBitOutput::kSiluMul) {
    // A pair's two rows make one output.
    constexpr int kOutputs = F::kRows / 2;
    for (int o = static_cast<int>(threadIdx.x); o < kOutputs * n_tokens; o += F::kThreads) {
      const int token = o / kOutputs;
      const int i = o % kOutputs;
      const int row = row_group * kOutputs + i;
      if (row >= p.n_rows) continue;
      const int slot = i / 8 * 16 + i % 8;
      float gate = value_of(slot, token);
      float up = value_of(slot + 8, token);
      if (p.bias != nullptr) {
        gate += p.bias[row];
        up += p.bias[p.n_rows + row];
      }
      store(token, row, gate / (1.0f + expf(-gate)) * up);
    }
    return;
  }
  for (int o = static_cast<int>(threadIdx.x); o < F::kRows * n_tokens; o += F::kThreads) {
    const int token = o / F::kRows;
    const int i = o % F::kRows;
    int row = row_group * F::kRows + i;
    if (p.is_interleaved) {
      const int of_linear = row / 16 * 8 + row % 8;
      if (of_linear >= p.n_rows) continue;
      row = row % 16 < 8 ? of_linear : of_linear + p.n_rows;
    } else if (row >= p.n_rows) {
      continue;
    }
    float v = value_of(i, token);
    if (p.bias != nullptr) v += p.bias[row];
    store(token, row, v);
  }
}

template <typename F>
__global__ void __launch_bounds__(F::kThreads, F::kCtasMin) LowBitKernel(const KernelParams p) {
  extern __shared__ uint4 shared[];
  LetNextKernelStart();
  const int lane = static_cast<int>(threadIdx.x % 32u);
  const int warp = static_cast<int>(threadIdx.x / 32u);
  const int token_first = static_cast<int>(blockIdx.y) * F::kTokens;
  const int n_tokens = min(p.n_tokens - token_first, F::kTokens);
  const uint32_t stage_bytes = static_cast<uint32_t>(F::StageBytes(n_tokens));
  const uint32_t ring = SharedAddress(shared) + warp * F::kStages * stage_bytes;
  const uint32_t ring_end = ring + F::kStages * stage_bytes;
  auto* all_sums = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) +
                                            F::kWarps * F::kStages * stage_bytes);

  Stream<F> stream(p, lane, warp, token_first);
  int n_copied = 0;
#pragma unroll 1
  for (; n_copied < F::kStages && stream.has_next(p); ++n_copied) {
    stream.CopyWeights(p, ring + n_copied * stage_bytes);
    stream.Advance(p);
  }
  CommitCopies();
  WaitForPreviousKernel();
  int x_block = warp;
#pragma unroll 1
  for (int d = 0; d < F::kStages; ++d) {
    if (d < n_copied) stream.CopyActivations(p, x_block, ring + d * stage_bytes);
    CommitCopies();
    x_block += F::kWarps;
    if (x_block >= p.n_blocks) x_block = warp;
  }

  // Where a lane reads the activations of its token of each token tile; any token's where it has
  // none, since nobody looks at the sums.
  uint32_t x_first[F::kTokenTiles];  // in a stage, of piece 0
  int x_swap[F::kTokenTiles];        // what odd pieces lie off, for odd tokens
#pragma unroll
  for (int n = 0; n < F::kTokenTiles; ++n) {
    const int token = min(n * 8 + lane / 4, n_tokens - 1);
    x_first[n] = F::kWeightBytes + token * kTokenBytes + lane % 4 * 16 + token % 2 * kPieceBytes;
    x_swap[n] = token % 2 * -2 * kPieceBytes;
  }

  uint32_t stage = ring;
  int parity = 0;
  for (int row_group = static_cast<int>(blockIdx.x); row_group < p.n_row_groups;
       row_group += static_cast<int>(gridDim.x)) {
    float total[F::kRowTiles][F::kTokenTiles][4] = {};
    for (int block = warp; block < p.n_blocks; block += F::kWarps) {
      asm volatile("cp.async.wait_group %0;" ::"n"(F::kStages - 1) : "memory");
      __syncwarp();
      uint32_t words[F::kRowTiles][kWordsHeld<F>];
      float acc[F::kRowTiles][F::kPlanes][F::kTokenTiles][4];
      float sums[F::kTokenTiles][4];
      uint4 x[F::kTokenTiles];
#pragma unroll
      for (int s = 0; s < kServingSteps; ++s) {
        constexpr int kStepsOfGrid = kServingSteps / F::kGrids;
        if (s % kStepsOfGrid == 0) {
#pragma unroll
          for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sums[n][c] = 0;
#pragma unroll
              for (int r = 0; r < F::kRowTiles; ++r) {
#pragma unroll
                for (int plane = 0; plane < F::kPlanes; ++plane) acc[r][plane][n][c] = 0;
              }
            }
          }
        }
        uint32_t b[F::kTokenTiles][2];
#pragma unroll
        for (int n = 0; n < F::kTokenTiles; ++n) {
          if (s % 2 == 0) {
            x[n] = LoadShared16(stage + x_first[n] + s / 2 * kPieceBytes +
                                (s % 4 == 2 ? x_swap[n] : 0));
          }
          b[n][0] = s % 2 == 0 ? x[n].x : x[n].z;
          b[n][1] = s % 2 == 0 ? x[n].y : x[n].w;
        }
        const uint32_t constant[4] = {OffsetOf<F::kBits>(s, 0), kOnes, OffsetOf<F::kBits>(s, 1),
                                      kOnes};
#pragma unroll
        for (int n = 0; n < F::kTokenTiles; ++n) Mma(sums[n], constant, b[n][0], b[n][1], sums[n]);
#pragma unroll
        for (int r = 0; r < F::kRowTiles; ++r) {
          LoadWords<F>(stage + r * ServingBlockBytes(F::kBits), lane, s, words[r]);
          MultiplyStep<F>(words[r], s, b, acc[r]);
        }
        if ((s + 1) % kStepsOfGrid == 0) {
#pragma unroll
          for (int r = 0; r < F::kRowTiles; ++r) {
            const uint32_t grid =
                stage + F::kCodeBytes + (r * F::kGrids + s / kStepsOfGrid) * F::kGridBytes;
            AddGroup<F>(grid, lane, acc[r], sums, total[r]);
          }
        }
      }
      __syncwarp();
      if (stream.has_next(p)) {
        stream.CopyWeights(p, stage);
        stream.CopyActivations(p, stream.block(), stage);
        stream.Advance(p);
      }
      CommitCopies();
      stage += stage_bytes;
      if (stage == ring_end) stage = ring;
    }
    float* sums = all_sums + parity * F::kSumPlaces * F::SumFloats(n_tokens);
    float* own = sums + warp % F::kSumPlaces * F::SumFloats(n_tokens) + lane / 4;
    const auto leave_sums = [&](bool add) {
#pragma unroll
      for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int token = n * 8 + lane % 4 * 2 + c;
          if (token >= n_tokens) continue;
#pragma unroll
          for (int r = 0; r < F::kRowTiles; ++r) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& place = own[token * F::kSumStride + r * kServingTileRows + h * 8];
              place = add ? total[r][n][2 * h + c] + place : total[r][n][2 * h + c];
            }
          }
        }
      }
    };
    if (F::kSumPlaces < F::kWarps) {
      if (warp >= F::kSumPlaces) leave_sums(false);
      __syncthreads();
      if (warp < F::kSumPlaces) leave_sums(true);
    } else {
      leave_sums(false);
    }
    __syncthreads();
    Finish<F>(p, row_group, token_first, n_tokens, sums);
    if (F::kSumCopies == 2) {
      parity ^= 1;
    } else {
      __syncthreads();
    }
  }
}

// What the caller of a launch has decided.
struct LaunchPlan {
  KernelParams params;  // n_row_groups is set here
  int grids_in_block = 1;
  int token_tiles = 1;
  int row_tiles = 2;
  int warps = 8;
  int ctas_max = 0;  // on the device at a time; beyond, a CTA takes several groups of rows
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

template <typename F>
absl::Status LaunchForm(const LaunchPlan& plan) {
  KernelParams params = plan.params;
  params.n_row_groups = (params.n_row_tiles + F::kRowTiles - 1) / F::kRowTiles;
  const int n_tokens = std::min(params.n_tokens, F::kTokens);
  const int token_chunks = (params.n_tokens + F::kTokens - 1) / F::kTokens;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      LowBitKernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SharedBytes(F::kTokens)));
  // Each CTA gets the same number of groups, or one less.
  const int ctas_max = std::max(plan.ctas_max / token_chunks, 1);
  const int rounds = (params.n_row_groups + ctas_max - 1) / ctas_max;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((params.n_row_groups + rounds - 1) / rounds),
                        static_cast<unsigned>(token_chunks));
  config.blockDim = dim3(F::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(F::SharedBytes(n_tokens));
  config.stream = plan.stream;
  config.attrs = &attribute;
  config.numAttrs = plan.overlap_previous ? 1 : 0;
  WALSH_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, LowBitKernel<F>, params));
  return LaunchStatus("LowBitMatmul", plan.stream);
}

// The most row tiles that fit shared memory and registers, up to kWanted.
template <int kBits, bool kCodebook, int kGrids, int kTokenTiles, int kWanted, int kWarps>
constexpr int RowTilesThatFit() {
  using F = Form<kBits, kCodebook, kGrids, kTokenTiles, kWanted, kWarps>;
  constexpr int kSharedMax = 227 << 10;
  constexpr int kRegisterRowsMax = kWarps == 8 ? 8 : 4;
  if constexpr (kWanted > 1 &&
                (F::SharedBytes(F::kTokens) > kSharedMax || F::kRegisterRows > kRegisterRowsMax)) {
    return RowTilesThatFit<kBits, kCodebook, kGrids, kTokenTiles, kWanted / 2, kWarps>();
  } else {
    static_assert(F::SharedBytes(F::kTokens) <= kSharedMax);
    return kWanted;
  }
}
template <int kBits, bool kCodebook, int kGrids, int kTokenTiles, int kWarps, int kWanted>
absl::Status LaunchRows(const LaunchPlan& plan) {
  constexpr int kFits = RowTilesThatFit<kBits, kCodebook, kGrids, kTokenTiles, kWanted, kWarps>();
  return LaunchForm<Form<kBits, kCodebook, kGrids, kTokenTiles, kFits, kWarps>>(plan);
}
// Those cuts that were the best of some shape.
template <int kBits, bool kCodebook, int kGrids>
absl::Status LaunchGrids(const LaunchPlan& plan) {
  if (plan.warps == 16) {
    if (plan.token_tiles > 1) return LaunchRows<kBits, kCodebook, kGrids, 2, 16, 2>(plan);
    return plan.row_tiles == 1 ? LaunchRows<kBits, kCodebook, kGrids, 1, 16, 1>(plan)
                               : LaunchRows<kBits, kCodebook, kGrids, 1, 16, 2>(plan);
  }
  switch (plan.token_tiles) {
    case 1:
      return plan.row_tiles == 1   ? LaunchRows<kBits, kCodebook, kGrids, 1, 8, 1>(plan)
             : plan.row_tiles == 2 ? LaunchRows<kBits, kCodebook, kGrids, 1, 8, 2>(plan)
                                   : LaunchRows<kBits, kCodebook, kGrids, 1, 8, 4>(plan);
    case 2:
      return plan.row_tiles <= 2 ? LaunchRows<kBits, kCodebook, kGrids, 2, 8, 2>(plan)
                                 : LaunchRows<kBits, kCodebook, kGrids, 2, 8, 4>(plan);
    default:
      return LaunchRows<kBits, kCodebook, kGrids, 4, 8, 2>(plan);
  }
}

template <int kBits, bool kCodebook>
absl::Status LaunchWidth(const LaunchPlan& plan) {
  switch (plan.grids_in_block) {
    case 1:
      return LaunchGrids<kBits, kCodebook, 1>(plan);
    case 2:
      return LaunchGrids<kBits, kCodebook, 2>(plan);
    default:
      return LaunchGrids<kBits, kCodebook, 4>(plan);
  }
}

// Each in a file of its own, low_bit_*.cu.
absl::Status Launch2(const LaunchPlan& plan);
absl::Status Launch3(const LaunchPlan& plan);
absl::Status Launch4(const LaunchPlan& plan);
absl::Status Launch8(const LaunchPlan& plan);
absl::Status LaunchCodebook(const LaunchPlan& plan);

}  // namespace walsh::kernels::cuda::low_bit
