// The kernel of LowBitMatmul (worker/kernels/cuda/low_bit_matmul.h) and its launch, for one width
// in each file that includes this.
//
// A CTA of 8 warps takes groups of 16 · kRowTiles rows and 8 · kTokenTiles tokens. Its warps have
// the same rows and share the columns, block by block; each warp runs on its own until a group of
// rows is done. Weights travel by cp.async into a ring of kStages blocks for each warp, the next
// ones while the present are multiplied, over the ends of groups of rows too. A lane copies and
// reads its own 16-byte pieces. Activations come from the L2 straight into the registers that the
// fragments want, a piece of 32 columns ahead: each is used by one warp of the CTA only, so that
// shared memory would gain nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/serving_codes.h"

namespace walsh::kernels::cuda::low_bit {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kPieces = 4;  // of a block's columns: 32 each, two steps

struct KernelParams {
  const uint8_t* codes;
  const uint8_t* grids;
  int n_row_tiles;
  int n_blocks;  // of columns
  int n_grids;   // of a row tile
  int blocks_of_grid;
  int n_row_groups;
  int n_splits;
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
template <int kBits_, bool kCodebook_, int kGrids_, int kTokenTiles_, int kRowTiles_>
struct Form {
  static constexpr int kBits = kBits_;
  static constexpr bool kCodebook = kCodebook_;
  static constexpr int kGrids = kGrids_;  // of a block of columns: 1, 2 or 4
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kRowTiles = kRowTiles_;

  static constexpr int kPlanes = kCodebook ? 3 : 1;
  static constexpr int kRows = kRowTiles * kServingTileRows;
  static constexpr int kTokens = kTokenTiles * 8;
  static constexpr int kGridBytes = kServingTileRows * (kCodebook ? 8 : 4);
  static constexpr int kCodeBytes = kRowTiles * ServingBlockBytes(kBits);
  static constexpr int kStageBytes = kCodeBytes + kRowTiles * kGrids * kGridBytes;
  // Two or three CTAs fit a multiprocessor, and those of the next kernel beside them.
  static constexpr int kRingBytes = 5120;
  static constexpr int kStages = std::clamp(kRingBytes / kStageBytes, 2, 4);
  // Pieces of activations in registers.
  static constexpr int kAhead = kTokenTiles == 1 ? 4 : 2;
  // A warp's sums of a group of rows, twice, so that one barrier a group suffices.
  static constexpr int kSumFloats = kRows * kTokens;
  static constexpr int kSumsBytes = 2 * kWarps * kSumFloats * static_cast<int>(sizeof(float));
  // The CTA's sums, which the others of its cluster read.
  static constexpr int kSharedBytes =
      kWarps * kStages * kStageBytes + kSumsBytes + kSumFloats * static_cast<int>(sizeof(float));
  static constexpr int kCtasMin = kTokenTiles == 1 && !kCodebook && kRowTiles <= 2 ? 3
                                  : kTokenTiles <= 2                               ? 2
                                                                                   : 1;
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
__device__ __forceinline__ void ClusterBarrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}
// A float of shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ float ReadOfCta(const float* p, int rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(SharedAddress(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

// Where a lane's weights come from next: a warp takes its blocks of a group of rows, then those of
// its CTA's next group.
template <typename F>
class WeightStream {
 public:
  // A warp beyond the last block has no weights.
  __device__ __forceinline__ WeightStream(const KernelParams& p, int lane, int row_group,
                                          int row_groups_step, int first_block, int blocks_step)
      : lane_(lane),
        row_group_(first_block < p.n_blocks ? row_group : p.n_row_groups),
        row_groups_step_(row_groups_step),
        first_block_(first_block),
        blocks_step_(blocks_step),
        policy_(EvictFirst()) {
    if (row_group_ < p.n_row_groups) Begin(p);
  }

  // Starts to copy the next block of each row tile to `stage`, and goes on.
  __device__ __forceinline__ void Copy(const KernelParams& p, uint32_t stage) {
    if (row_group_ < p.n_row_groups) {
#pragma unroll
      for (int r = 0; r < F::kRowTiles; ++r) {
        const uint8_t* from = codes_ + static_cast<uint64_t>(TileBytes(p)) * min(r, last_tile_);
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
      Advance(p);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
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
  __device__ __forceinline__ void Begin(const KernelParams& p) {
    block_ = first_block_;
    const int tile = row_group_ * F::kRowTiles;
    last_tile_ = min(F::kRowTiles, p.n_row_tiles - tile) - 1;
    codes_ =
        p.codes + (static_cast<int64_t>(tile) * p.n_blocks + block_) * kBlockBytes + lane_ * 16;
    BeginGrids(p);
  }
  __device__ __forceinline__ void BeginGrids(const KernelParams& p) {
    const int grid = block_ * F::kGrids / p.blocks_of_grid;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = c * 32 + lane_;
      const int tile = row_group_ * F::kRowTiles + min(i / kPiecesOfTile, last_tile_);
      grids_[c] = p.grids + (static_cast<int64_t>(tile) * p.n_grids + grid) * F::kGridBytes +
                  i % kPiecesOfTile * 16;
    }
  }
  __device__ __forceinline__ void Advance(const KernelParams& p) {
    block_ += blocks_step_;
    if (block_ < p.n_blocks) {
      codes_ += blocks_step_ * kBlockBytes;
      if (p.blocks_of_grid == 1) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) grids_[c] += blocks_step_ * F::kGrids * F::kGridBytes;
      } else {
        BeginGrids(p);
      }
      return;
    }
    row_group_ += row_groups_step_;
    if (row_group_ < p.n_row_groups) Begin(p);
  }

  const int lane_;
  int row_group_;
  const int row_groups_step_;
  const int first_block_;
  const int blocks_step_;
  const uint64_t policy_;
  int block_ = 0;
  int last_tile_ = 0;  // of the group of rows
  const uint8_t* codes_ = nullptr;
  const uint8_t* grids_[kChunks];
};

// 16 bytes that another kernel may have written, from the L2, or zeros.
__device__ __forceinline__ uint4 LoadOrZero(const __nv_bfloat16* address, bool is_there) {
  uint4 v;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.u32 there, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(address), "r"(static_cast<uint32_t>(is_there)));
  return v;
}

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

// What a CTA of the cluster does with the sums of its group of rows: add up the warps, then the
// CTAs, and write. A thread takes an output.
template <typename F>
__device__ __forceinline__ void Finish(const KernelParams& p, int row_group, int token_first,
                                       int split, const float* sums, float* cta_sums) {
  // Sums lie as the fragments have them: [row tile][token tile][h][lane][2].
  const auto index_of = [](int row, int token) {
    const int r = row / kServingTileRows;
    const int h = row % kServingTileRows / 8;
    const int lane = row % 8 * 4 + token % 8 / 2;
    return (((r * F::kTokenTiles + token / 8) * 2 + h) * 32 + lane) * 2 + token % 2;
  };
  const auto warp_sum = [&](int i) {
    float sum = sums[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w * F::kSumFloats + i];
    return sum;
  };
  const int n_tokens = min(F::kTokens, p.n_tokens - token_first);
  const bool is_shared = p.n_splits > 1;
  if (is_shared) {
    for (int o = static_cast<int>(threadIdx.x); o < F::kRows * n_tokens; o += kThreads) {
      const int i = index_of(o % F::kRows, o / F::kRows);
      cta_sums[i] = warp_sum(i);
    }
    ClusterBarrier();
  }
  const auto value_of = [&](int row, int token) {
    const int i = index_of(row, token);
    if (!is_shared) return warp_sum(i);
    float sum = ReadOfCta(cta_sums + i, 0);
    for (int rank = 1; rank < p.n_splits; ++rank) sum += ReadOfCta(cta_sums + i, rank);
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
  // Outputs of a group of rows: a pair's two rows make one with kSiluMul.
  const bool is_silu = p.output == LowBitOutput::kSiluMul;
  const int n_rows = is_silu ? F::kRows / 2 : F::kRows;
  for (int o = static_cast<int>(threadIdx.x) * p.n_splits + split; o < n_rows * n_tokens;
       o += kThreads * p.n_splits) {
    const int token = o / n_rows;
    const int i = o % n_rows;
    if (is_silu) {
      const int row = row_group * n_rows + i;
      if (row >= p.n_rows) continue;
      const int slot = i / 8 * 16 + i % 8;
      float gate = value_of(slot, token);
      float up = value_of(slot + 8, token);
      if (p.bias != nullptr) {
        gate += p.bias[row];
        up += p.bias[p.n_rows + row];
      }
      store(token, row, gate / (1.0f + expf(-gate)) * up);
      continue;
    }
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
  // The others may still read this CTA's sums.
  if (is_shared) ClusterBarrier();
}

template <typename F>
__global__ void __launch_bounds__(kThreads, F::kCtasMin) LowBitKernel(const KernelParams p) {
  extern __shared__ uint4 shared[];
  LetNextKernelStart();
  const int lane = static_cast<int>(threadIdx.x % 32u);
  const int warp = static_cast<int>(threadIdx.x / 32u);
  const int split = static_cast<int>(blockIdx.x) % p.n_splits;
  const int first_row_group = static_cast<int>(blockIdx.x) / p.n_splits;
  const int row_groups_step = static_cast<int>(gridDim.x) / p.n_splits;
  const int first_block = split * kWarps + warp;
  const int blocks_step = p.n_splits * kWarps;
  const int token_first = static_cast<int>(blockIdx.y) * F::kTokens;
  const uint32_t ring = SharedAddress(shared) + warp * F::kStages * F::kStageBytes;
  auto* all_sums = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) +
                                            kWarps * F::kStages * F::kStageBytes);

  WeightStream<F> weights(p, lane, first_row_group, row_groups_step, first_block, blocks_step);
#pragma unroll
  for (int d = 0; d < F::kStages; ++d) weights.Copy(p, ring + d * F::kStageBytes);
  WaitForPreviousKernel();

  // Activations of this lane's token of each token tile, 8 columns of each piece.
  const __nv_bfloat16* x_lane[F::kTokenTiles];
#pragma unroll
  for (int n = 0; n < F::kTokenTiles; ++n) {
    const int token = min(token_first + n * 8 + lane / 4, p.n_tokens - 1);
    x_lane[n] = p.x + token * p.x_stride + lane % 4 * 8;
  }
  const int n_tokens = p.n_tokens - token_first - lane / 4;  // from this lane's on
  const int n_cols = p.cols - lane % 4 * 8;
  uint4 x[F::kAhead][F::kTokenTiles];
  const auto load_x = [&](int block, int piece, uint4(&to)[F::kTokenTiles]) {
    const bool is_there = block * kServingBlockCols + piece * 32 < n_cols;
#pragma unroll
    for (int n = 0; n < F::kTokenTiles; ++n) {
      to[n] = LoadOrZero(x_lane[n] + block * kServingBlockCols + piece * 32,
                         is_there && n * 8 < n_tokens);
    }
  };
  if (first_block < p.n_blocks) {
#pragma unroll
    for (int i = 0; i < F::kAhead; ++i) load_x(first_block, i, x[i]);
  }

  uint32_t stage = ring;
  int parity = 0;
  for (int row_group = first_row_group; row_group < p.n_row_groups; row_group += row_groups_step) {
    float total[F::kRowTiles][F::kTokenTiles][4] = {};
    for (int block = first_block; block < p.n_blocks; block += blocks_step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(F::kStages - 1) : "memory");
      __syncwarp();
      const int next_block = block + blocks_step < p.n_blocks ? block + blocks_step : first_block;
      uint32_t words[F::kRowTiles][kWordsHeld<F>];
      float acc[F::kRowTiles][F::kPlanes][F::kTokenTiles][4];
      float sums[F::kTokenTiles][4];
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
          const uint4& piece = x[s / 2 % F::kAhead][n];
          b[n][0] = s % 2 == 0 ? piece.x : piece.z;
          b[n][1] = s % 2 == 0 ? piece.y : piece.w;
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
        if (s % 2 == 1) {
          constexpr int kHere = kPieces - F::kAhead;  // pieces of this block still to be loaded
          const int piece = s / 2;
          if (piece < kHere) {
            load_x(block, piece + F::kAhead, x[piece % F::kAhead]);
          } else {
            load_x(next_block, piece - kHere, x[piece % F::kAhead]);
          }
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
      weights.Copy(p, stage);
      stage += F::kStageBytes;
      if (stage == ring + F::kStages * F::kStageBytes) stage = ring;
    }
    float* sums = all_sums + parity * kWarps * F::kSumFloats;
    auto* own = reinterpret_cast<float2*>(sums + warp * F::kSumFloats);
#pragma unroll
    for (int r = 0; r < F::kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < F::kTokenTiles; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          own[((r * F::kTokenTiles + n) * 2 + h) * 32 + lane] =
              make_float2(total[r][n][2 * h], total[r][n][2 * h + 1]);
        }
      }
    }
    __syncthreads();
    Finish<F>(p, row_group, token_first, split, sums, all_sums + 2 * kWarps * F::kSumFloats);
    parity ^= 1;
  }
}

// What the caller of a launch has decided.
struct LaunchPlan {
  KernelParams params;  // n_row_groups is set here
  int token_tiles = 1;
  int row_tiles = 2;
  int grids_in_block = 1;
  int ctas_max = 0;  // on the device at a time, where a CTA takes several groups of rows
  int token_chunks = 1;
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

template <typename F>
absl::Status LaunchForm(const LaunchPlan& plan) {
  KernelParams params = plan.params;
  params.n_row_groups = (params.n_row_tiles + F::kRowTiles - 1) / F::kRowTiles;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      LowBitKernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, F::kSharedBytes));
  // Each CTA gets the same number of groups, or one less.
  const int ctas_max = std::max(plan.ctas_max / (params.n_splits * plan.token_chunks), 1);
  const int rounds = (params.n_row_groups + ctas_max - 1) / ctas_max;
  const int ctas = (params.n_row_groups + rounds - 1) / rounds;
  cudaLaunchAttribute attributes[2];
  unsigned n_attributes = 0;
  if (params.n_splits > 1) {
    attributes[n_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[n_attributes].val.clusterDim = {static_cast<unsigned>(params.n_splits), 1, 1};
    ++n_attributes;
  }
  if (plan.overlap_previous) {
    attributes[n_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n_attributes].val.programmaticStreamSerializationAllowed = 1;
    ++n_attributes;
  }
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(ctas * params.n_splits), static_cast<unsigned>(plan.token_chunks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = F::kSharedBytes;
  config.stream = plan.stream;
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  WALSH_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, LowBitKernel<F>, params));
  return LaunchStatus("LowBitMatmul", plan.stream);
}

template <int kBits, bool kCodebook, int kGrids>
absl::Status LaunchTokens(const LaunchPlan& plan) {
  switch (plan.token_tiles) {
    case 1:
      switch (plan.row_tiles) {
        case 1:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 1, 1>>(plan);
        case 2:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 1, 2>>(plan);
        default:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 1, kCodebook ? 2 : 4>>(plan);
      }
    case 2:
      switch (plan.row_tiles) {
        case 1:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 2, 1>>(plan);
        case 2:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 2, 2>>(plan);
        default:
          return LaunchForm<Form<kBits, kCodebook, kGrids, 2, kCodebook ? 2 : 4>>(plan);
      }
    default:
      return plan.row_tiles == 1 || kCodebook
                 ? LaunchForm<Form<kBits, kCodebook, kGrids, 4, 1>>(plan)
                 : LaunchForm<Form<kBits, kCodebook, kGrids, 4, 2>>(plan);
  }
}

template <int kBits, bool kCodebook>
absl::Status LaunchWidth(const LaunchPlan& plan) {
  switch (plan.grids_in_block) {
    case 1:
      return LaunchTokens<kBits, kCodebook, 1>(plan);
    case 2:
      return LaunchTokens<kBits, kCodebook, 2>(plan);
    default:
      return LaunchTokens<kBits, kCodebook, 4>(plan);
  }
}

// Each in a file of its own, low_bit_*.cu.
absl::Status Launch2(const LaunchPlan& plan);
absl::Status Launch3(const LaunchPlan& plan);
absl::Status Launch4(const LaunchPlan& plan);
absl::Status Launch8(const LaunchPlan& plan);
absl::Status LaunchCodebook(const LaunchPlan& plan);

}  // namespace walsh::kernels::cuda::low_bit
