// The kernels of LowBitMatmul (worker/kernels/cuda/low_bit_matmul.h) and their launch, for one
// width in each file that includes this.
//
// A CTA takes some tiles of 16 rows; its warps have the same rows and share the columns, block by
// block. Each warp runs on its own: it fills a ring of blocks by bulk copies, far ahead, and
// multiplies the oldest. Its sums stay in shared memory until all warps have theirs (a pass over
// some of the CTA's rows). The ring is deep, so that much of the time that one kernel needs to
// begin and end is spent reading the weights of the next.
//
// Few tokens, up to four: the kernel quantizes the activations itself, each warp those of its
// columns, and keeps their fragments in registers for all tiles of a pass. Eight columns of B are
// hi and lo of four tokens or, of two, those of two tiles: a tile has its own columns and zeros in
// the others, so that two add up in one accumulator. One token is in all columns, and of two or
// four tiles, one after the other, each lane keeps the sums of one. Either way what follows the
// products is done once for several tiles.
//
// More tokens: the records of the activations come through the ring too, made by a launch before.
//
// Sums of integers are exact, and those of fp32 have one order, whatever the kernel: column block b
// belongs to part b % 16; the blocks of a part are added up in order, then parts w and w + 8, then
// those pairs in order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "common/status_macros.h"
#include "worker/kernels/cuda/bulk_copy.cuh"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/fixed_point.cuh"
#include "worker/kernels/cuda/gated_unit.cuh"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/serving_codes.h"

namespace walsh::kernels::cuda::low_bit {

inline constexpr int kTileTokens = 4;  // of a token tile: eight columns of B, hi and lo of each
inline constexpr int kParts = 16;
inline constexpr int kPairs = 8;  // of parts

struct KernelParams {
  const uint8_t* weights = nullptr;
  int n_row_tiles = 0;
  int n_blocks = 0;  // of columns
  int pass_tiles = 0;
  int n_tokens = 0;
  int chunk_tokens = 0;  // of a CTA
  // Rows of a linear of two that are interleaved, all rows otherwise.
  int n_rows = 0;
  bool is_interleaved = false;
  LowBitOutput output = LowBitOutput::kStore;
  Activations x;                       // of a form that quantizes
  const uint8_t* records = nullptr;    // [n_blocks, n_tokens], otherwise
  const float* square_sums = nullptr;  // [n_blocks, n_tokens], likewise
  float inverse_cols = 0;
  float eps = 0;
  const float* bias = nullptr;
  float* y_float = nullptr;
  __nv_bfloat16* y_bf16 = nullptr;
  int64_t y_stride = 0;
  // Of shared memory: warps · n_stages stages, their barriers, records that the CTA holds, sums.
  int n_stages = 0;
  int barriers_at = 0;
  int records_at = 0;
  int squares_at = 0;
  int square_sums_at = 0;
  int sums_at = 0;
  int sums_stride = 0;  // floats from warp to warp
  uint32_t zero = 0;    // which the compiler does not know
};

// The codes of a width are multiplied as code · 2^shift, so that most need no shift of their own.
__host__ __device__ constexpr int CodeShift(int bits) { return bits == 8 ? 0 : bits; }

// What the weights are, and whether their codes are shifted to one place before the products (one
// class) or sums of codes and of codes · 2^shift are put together behind them (two). The second is
// less work for few tokens.
template <int kBits_, bool kCodebook_, int kGrids_, int kClasses_>
struct WeightForm {
  static constexpr int kBits = kBits_;
  static constexpr bool kCodebook = kCodebook_;
  static constexpr int kGrids = kGrids_;  // of a block of columns: 1, 2 or 4
  static constexpr int kClasses = kBits == 8 ? 1 : kClasses_;
  static constexpr int kShift = CodeShift(kBits);
  static constexpr int kPlanes = kCodebook ? 3 : 1;
  static constexpr int kSteps = kServingSteps / kGrids;  // of a group
  static constexpr int kBlockBytes = ServingBlockBytes(kBits, kCodebook, kGrids);
  static constexpr int kRecordBytes = RecordBytes(kGrids);
};

// Few tokens, up to kTokens. kRowTiles are those of a stage. Of kSlots of them each lane has the
// sums of one: what follows the products is done once for all of them. Activations that are
// transformed on their way have kernels of their own, so that the others have no register less.
template <int kBits, bool kCodebook, int kGrids, int kRowTiles_, int kSlots_, int kTokens_,
          bool kTransforms_ = false>
struct FewForm : WeightForm<kBits, kCodebook, kGrids, 2> {
  using Base = WeightForm<kBits, kCodebook, kGrids, 2>;
  using Transforming = FewForm<kBits, kCodebook, kGrids, kRowTiles_, kSlots_, kTokens_, true>;
  static constexpr bool kTransforms = kTransforms_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kUnits = kRowTiles / kSlots;
  static constexpr int kTokens = kTokens_;
  static constexpr int kSlotTokens = kTileTokens / kSlots;  // that a slot's columns have room for
  static_assert(kTokens <= kSlotTokens);
  // Two tokens: the tiles share accumulators, each has columns of B and zeros in the others. One:
  // it is in all columns, a tile after the other has the accumulators.
  static constexpr bool kSharesAccumulators = kSlots > 1 && kTokens > 1;
  static constexpr int kWarps = kParts;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStageBytes = kRowTiles * Base::kBlockBytes;
  // One token's records are few: all lanes shall have some of them.
  static constexpr int kRecordLanes = kTokens == 1 ? 16 : low_bit::kRecordLanes;

  // Sums of kSlots tiles, those of rows i and i + 8 together.
  static constexpr int kUnitSums = 8 * kSlots * kTokens;
  static constexpr int kUnitFloats = 2 * kUnitSums;
  // Where a lane has them. Lanes of a token that is not there have the sums of one that is.
  static __device__ __forceinline__ int SumOfLane(int lane) {
    return lane / 4 * kSlots * kTokens + lane % 4 / kSlotTokens * kTokens +
           min(lane % kSlotTokens, kTokens - 1);
  }
  // Of a row of a pass in a warp's sums, for the first token; floats from token to token.
  static constexpr int kTokenStride = 2;
  static __device__ __forceinline__ int PlaceOfSum(int tile, int row) {
    const int sum = row % 8 * kSlots * kTokens + tile % kSlots * kTokens;
    return tile / kSlots * kUnitFloats + sum * 2 + row / 8;
  }
};

// More tokens, in tiles of four, and row tiles of a warp at a time.
template <int kBits, bool kCodebook, int kGrids, int kTokenTiles_, int kRowTiles_>
struct ManyForm : WeightForm<kBits, kCodebook, kGrids, 1> {
  using Base = WeightForm<kBits, kCodebook, kGrids, 1>;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kTokens = kTokenTiles * kTileTokens;
  static constexpr int kWarps = kPairs;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kRowTiles * kServingTileRows;
  static constexpr int kWeightBytes = kRowTiles * Base::kBlockBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * Base::kRecordBytes;
  // Floats from token to token: fragments are written without bank conflicts.
  static constexpr int kTokenStride = kRows + 8;

  static __device__ __forceinline__ int PlaceOfSum(int tile, int row) {
    return tile * kServingTileRows + row;
  }
};

__device__ __forceinline__ void Mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ float2 HalvesToFloats(uint32_t halves) {
  __half2 h;
  memcpy(&h, &halves, sizeof(h));
  return __half22float2(h);
}

// Words of a lane that registers of a step come from: all of a block at 2 and 3 bits, four else.
template <typename F>
inline constexpr int kWordsHeld = F::kBits == 3 ? 6 : 4;

template <typename F>
__device__ __forceinline__ void LoadWords(const uint8_t* block, int lane, int s,
                                          uint32_t (&words)[kWordsHeld<F>]) {
  const int piece = F::kBits == 8 ? s : F::kBits == 4 ? s / 2 : 0;
  const uint4 v = *reinterpret_cast<const uint4*>(block + piece * 512 + lane * 16);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
  if constexpr (F::kBits == 3) {
    const uint2 rest = *reinterpret_cast<const uint2*>(block + 512 + lane * 8);
    words[4] = rest.x;
    words[5] = rest.y;
  }
}

// Whether the registers of step s hold codes · 2^shift (1) or codes (0, with two classes).
template <typename F>
__host__ __device__ constexpr int ClassOf(int s) {
  if (F::kClasses == 1) return 0;
  return F::kBits == 3 ? (s == 1 || s == 2 ? 1 : 0) : s % 2;
}

constexpr __host__ __device__ uint32_t InEachByte(uint32_t mask) { return mask * 0x01010101u; }

// Field s of 2 bits of each byte, or those of its bits that kMask has.
template <typename F, uint32_t kMask>
__device__ __forceinline__ uint32_t Field2(uint32_t word, int s) {
  if (F::kClasses == 2) {
    return (s < 2 ? word : word >> 4) & InEachByte(s % 2 == 0 ? kMask : kMask << 2);
  }
  const uint32_t shifted = s == 0 ? word << 2 : s == 1 ? word : word >> (2 * s - 2);
  return shifted & InEachByte(kMask << 2);
}

__device__ __forceinline__ uint32_t RotateRight(uint32_t word, int bits) {
  return __funnelshift_r(word, word, bits);
}

template <typename F>
__device__ __forceinline__ void Expand3(const uint32_t (&words)[6], int s, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = words[i];
    const uint32_t pair = words[4 + i / 2];
    if (s == 0) {
      a[i] = F::kClasses == 2 ? word & InEachByte(0x07) : word << 3 & InEachByte(0x38);
    } else if (s == 1) {
      a[i] = word & InEachByte(0x38);
    } else if (s == 2) {
      a[i] = (i % 2 == 0 ? pair : RotateRight(pair, 4)) & InEachByte(0x38);
    } else if (F::kClasses == 2) {
      const uint32_t high = (i % 2 == 0 ? pair : RotateRight(pair, 4)) & InEachByte(0x04);
      a[i] = (word >> 6 & InEachByte(0x03)) | high;
    } else {
      const uint32_t high = (i % 2 == 0 ? pair << 3 : RotateRight(pair, 1)) & InEachByte(0x20);
      a[i] = (word >> 3 & InEachByte(0x18)) | high;
    }
  }
}

// The registers of group g of a row tile's block: a[plane][step of the group]. The words of a step
// are load(s, words).
template <typename F, typename Load>
__device__ __forceinline__ void Expand(int g, Load&& load,
                                       uint32_t (&a)[F::kPlanes][F::kSteps][4]) {
  uint32_t words[kWordsHeld<F>];
#pragma unroll
  for (int k = 0; k < F::kSteps; ++k) {
    const int s = g * F::kSteps + k;
    constexpr int kStepsHeld = F::kBits <= 3 ? 4 : 8 / F::kBits;
    if (k == 0 || s % kStepsHeld == 0) load(s, words);
    if constexpr (F::kBits == 3) {
      Expand3<F>(words, s, a[0][k]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (F::kCodebook) {
          a[0][k][i] = Field2<F, 1>(words[i], s);
          a[1][k][i] = Field2<F, 2>(words[i], s);
          a[2][k][i] = Field2<F, 1>(words[i] & words[i] >> 1, s);
        } else if constexpr (F::kBits == 2) {
          a[0][k][i] = Field2<F, 3>(words[i], s);
        } else if constexpr (F::kBits == 4) {
          const bool is_low = s % 2 == 0;
          a[0][k][i] = F::kClasses == 2 ? words[i] & InEachByte(is_low ? 0x0F : 0xF0)
                                        : (is_low ? words[i] << 4 : words[i]) & InEachByte(0xF0);
        } else {
          a[0][k][i] = words[i];
        }
      }
    }
  }
}
template <typename F>
__device__ __forceinline__ void Expand(const uint8_t* block, int lane, int g,
                                       uint32_t (&a)[F::kPlanes][F::kSteps][4]) {
  Expand<F>(
      g, [&](int s, uint32_t(&words)[kWordsHeld<F>]) { LoadWords<F>(block, lane, s, words); }, a);
}

// A row's grid as floats: {scale, zero}, or a codebook as constant and factors of the low bit, the
// high bit times 2 (as it lies) and both.
template <typename F>
struct RowGrid {
  float v[F::kCodebook ? 4 : 2];
};
// Of rows i and i + 8, as it lies: halves.
template <typename F>
struct RawGrid {
  uint32_t v[F::kCodebook ? 4 : 2];
};
template <typename F>
__device__ __forceinline__ RawGrid<F> LoadRawGrid(const uint8_t* block, int lane, int g) {
  const uint8_t* grid = block + ServingCodeBytes(F::kBits) + g * ServingGridBytes(F::kCodebook);
  if constexpr (F::kCodebook) {
    const uint4 levels = *reinterpret_cast<const uint4*>(grid + lane / 4 * 16);
    return {{levels.x, levels.y, levels.z, levels.w}};
  } else {
    const uint2 pairs = *reinterpret_cast<const uint2*>(grid + lane / 4 * 8);
    return {{pairs.x, pairs.y}};
  }
}
template <typename F>
__device__ __forceinline__ RowGrid<F> GridOfRow(const RawGrid<F>& raw, int h) {
  if constexpr (F::kCodebook) {
    const float2 low = HalvesToFloats(raw.v[2 * h]);
    const float2 high = HalvesToFloats(raw.v[2 * h + 1]);
    const float of_low = __fsub_rn(low.y, low.x);
    return {{low.x, of_low, __fmul_rn(0.5f, __fsub_rn(high.x, low.x)),
             __fsub_rn(__fsub_rn(high.y, high.x), of_low)}};
  } else {
    const float2 pair = HalvesToFloats(raw.v[h]);
    return {{pair.x, pair.y}};
  }
}

// What the products of a group add up in.
template <typename F>
struct Accumulators {
  int v[F::kPlanes][F::kClasses][4] = {};
};

// Σ code · q · 2^shift of a row and token from the columns hi and lo of each class.
template <typename F>
__device__ __forceinline__ int SumOf(const int (&acc)[F::kClasses][4], int g, int h) {
  int hi = 0;
  int lo = 0;
  bool has_class[2] = {false, false};
#pragma unroll
  for (int k = 0; k < F::kSteps; ++k) has_class[ClassOf<F>(g * F::kSteps + k)] = true;
  if (F::kClasses == 2 && has_class[0]) {
    hi = acc[0][2 * h] << F::kShift;
    lo = acc[0][2 * h + 1] << F::kShift;
  }
  if (F::kClasses == 1 || has_class[1]) {
    hi += acc[F::kClasses - 1][2 * h];
    lo += acc[F::kClasses - 1][2 * h + 1];
  }
  return (hi << 8) + lo;
}
// Of rows i and i + 8.
template <typename F>
struct GroupSums {
  int v[2][F::kPlanes];

  __device__ __forceinline__ GroupSums() : v{} {}
  __device__ __forceinline__ GroupSums(const Accumulators<F>& acc, int g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int plane = 0; plane < F::kPlanes; ++plane) v[h][plane] = SumOf<F>(acc.v[plane], g, h);
    }
  }
};

// y += what a row's sums of a group give. `scale_sum` is a record's.
template <typename F>
__device__ __forceinline__ void AddGroup(const RowGrid<F>& row, const int (&sums)[F::kPlanes],
                                         float2 scale_sum, float& y) {
  if constexpr (F::kCodebook) {
    float sum = __fmul_rn(row.v[0], scale_sum.y);
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane) {
      sum = __fmaf_rn(row.v[1 + plane], __int2float_rn(sums[plane]), sum);
    }
    y = __fmaf_rn(scale_sum.x, sum, y);
  } else {
    const float sum = __fmaf_rn(-row.v[1], scale_sum.y, __int2float_rn(sums[0]));
    y = __fmaf_rn(__fmul_rn(row.v[0], scale_sum.x), sum, y);
  }
}

// The end of a pass over `n_tiles` tiles: adds up the warps' sums and writes. A thread has one row
// and some tokens; what it adds to for the first is on its way while the warps are waited for.
template <typename F>
__device__ __forceinline__ void Finish(const KernelParams& p, int warp, int first_tile, int n_tiles,
                                       int token_first, int n_tokens, const float* square_sums,
                                       const float* sums) {
  const bool is_pair = IsOfPairs(p.output);
  const int tile_shift = is_pair ? 3 : 4;  // outputs of a tile: 8 or 16
  const auto n_outputs = static_cast<unsigned>(n_tiles << tile_shift);
  if (n_tokens == 1 && warp * 32 >= static_cast<int>(n_outputs)) {
    __syncthreads();
    return;
  }
  int i = static_cast<int>(threadIdx.x);
  int token = threadIdx.x < n_outputs ? 0 : n_tokens;
  int token_step = 1;
  if (n_tokens > 1) {  // not in the way of one token
    token = static_cast<int>(threadIdx.x / n_outputs);
    i = static_cast<int>(threadIdx.x % n_outputs);
    token_step = static_cast<int>(F::kThreads / n_outputs);
  }
  const int slot = i & ((1 << tile_shift) - 1);
  const int tile = first_tile + (i >> tile_shift);
  int row = (tile << tile_shift) + slot;
  bool is_there = row < p.n_rows;
  if (p.is_interleaved && !is_pair) {
    row = tile * (kServingTileRows / 2) + slot % 8;
    is_there = row < p.n_rows;
    if (slot >= 8) row += p.n_rows;
  }
  is_there = is_there && token < token_step;
  int64_t at = (token_first + token) * p.y_stride + row;
  const auto before = [&] {
    const bool adds = p.output == LowBitOutput::kAdd && is_there && token < n_tokens;
    return adds ? p.y_float[at] : 0.0f;
  };
  float residual = before();
  float bias[2] = {0, 0};
  if (p.bias != nullptr && is_there) {
    bias[0] = p.bias[row];
    if (is_pair) bias[1] = p.bias[p.n_rows + row];
  }
  const auto sum_of_pairs = [&](const float* first) {
    float pairs[kPairs];
#pragma unroll
    for (int w = 0; w < kPairs; ++w) {
      pairs[w] = first[w * p.sums_stride];
      if (F::kWarps == kParts) {
        pairs[w] = __fadd_rn(pairs[w], first[(w + kPairs) * p.sums_stride]);
      }
    }
    float sum = pairs[0];
#pragma unroll
    for (int w = 1; w < kPairs; ++w) sum = __fadd_rn(sum, pairs[w]);
    return sum;
  };
  const float* of_row = sums + F::PlaceOfSum(i >> tile_shift, slot);
  __syncthreads();
  if (!is_there) return;
#pragma unroll 1
  while (token < n_tokens) {
    float factor = 1;
    if (p.x.has_norm) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kPairs; ++w) {
        const float* squares = square_sums + w * F::kTokens + token;
        sum = __fadd_rn(sum, __fadd_rn(squares[0], squares[kPairs * F::kTokens]));
      }
      factor = __frsqrt_rn(__fmaf_rn(sum, p.inverse_cols, p.eps));
    }
    const float* first = of_row + token * F::kTokenStride;
    float v = __fmaf_rn(sum_of_pairs(first), factor, bias[0]);
    if (is_pair) {
      const float up = __fmaf_rn(sum_of_pairs(first + F::PlaceOfSum(0, 8)), factor, bias[1]);
      v = (p.output == LowBitOutput::kGeluMul ? Gelu(v) : Silu(v)) * up;
    }
    if (p.y_bf16 != nullptr) {
      p.y_bf16[at] = __float2bfloat16_rn(v);
    } else {
      p.y_float[at] = residual + v;
    }
    token += token_step;
    at += token_step * p.y_stride;
    residual = before();
  }
}

// A warp's ring: n_stages stages of F::kStageBytes, filled and emptied in turn.
template <typename F>
class Ring {
 public:
  __device__ __forceinline__ Ring(const KernelParams& p, uint8_t* shared, int warp)
      : stages_(warp * p.n_stages * F::kStageBytes),
        address_(SharedAddress(shared) + stages_),
        barriers_(SharedAddress(shared + p.barriers_at) + warp * p.n_stages * 8) {}

  __device__ __forceinline__ void Init(const KernelParams& p) const {
    if (IsElected()) {
#pragma unroll 1
      for (int stage = 0; stage < p.n_stages; ++stage) InitBarrier(barriers_ + stage * 8);
      FenceBarriers();
    }
    __syncwarp();
  }
  __device__ __forceinline__ uint32_t address(int stage) const {
    return address_ + stage * F::kStageBytes;
  }
  __device__ __forceinline__ uint32_t barrier(int stage) const { return barriers_ + stage * 8; }
  // Where the oldest stage begins in shared memory.
  __device__ __forceinline__ int oldest() const { return stages_ + stage_ * F::kStageBytes; }
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ void Wait() const { WaitBarrier(barrier(stage_), parity_); }
  __device__ __forceinline__ void Pop(const KernelParams& p) {
    if (++stage_ == p.n_stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  const int stages_;
  const uint32_t address_;
  const uint32_t barriers_;
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// ---- Few tokens ----

// What a warp copies next: of each pass its blocks, of each block the tiles, kRowTiles at a time.
template <typename F>
class FewProducer {
 public:
  __device__ __forceinline__ FewProducer(const KernelParams& p, int warp, int first_tile,
                                         int end_tile)
      : warp_(warp),
        end_(end_tile),
        first_(warp < p.n_blocks ? first_tile : end_tile),
        block_(warp),
        policy_(EvictFirst()) {
    FindTiles(p);
  }
  __device__ __forceinline__ bool has_next() const { return n_left_ > 0; }

  // One lane copies; what is copied is known to all, so that it stays in uniform registers. A stage
  // that is filled again must have been read: a load that has begun may still be waiting behind
  // those of other warps when the copy arrives. So the copy's address depends on `read`, a word of
  // each load.
  __device__ __forceinline__ void Copy(const KernelParams& p, uint32_t stage, uint32_t barrier,
                                       uint32_t read = 0) {
    const int bytes = min(n_left_, F::kRowTiles) * F::kBlockBytes;
    if (IsElected()) {
      ExpectBytes(barrier, bytes);
      CopyBulkOnce(stage + (read & p.zero), from_, bytes, barrier, policy_);
    }
    from_ += F::kStageBytes;
    n_left_ -= F::kRowTiles;
    if (n_left_ > 0) return;
    block_ += kParts;
    if (block_ >= p.n_blocks) {
      block_ = warp_;
      first_ += p.pass_tiles;
    }
    FindTiles(p);
  }

 private:
  __device__ __forceinline__ void FindTiles(const KernelParams& p) {
    n_left_ = min(p.pass_tiles, end_ - first_);
    from_ = p.weights + static_cast<int64_t>(block_ * p.n_row_tiles + first_) * F::kBlockBytes;
  }

  const int warp_;
  const int end_;
  int first_;  // of the pass
  int block_;
  int n_left_ = 0;  // tiles of the pass and block
  const uint8_t* from_ = nullptr;
  const uint64_t policy_;
};

// Where a CTA of few tokens has its activations, in shared memory.
struct HeldActivations {
  uint8_t* records = nullptr;    // [n_blocks, n_tokens]
  float* squares = nullptr;      // [n_blocks, n_tokens], Σ x² of a record
  float* square_sums = nullptr;  // [kParts, F::kTokens], of a part
};

// Makes the records of a warp's blocks, as many at a time as it has lanes for, of (block, token) in
// order. Made before the activations may be read, so that nothing but their loads follows the wait
// for them.
template <typename F>
class Quantizer {
 public:
  __device__ __forceinline__ Quantizer(const KernelParams& p, const HeldActivations& held, int lane,
                                       int warp, int token_first, int n_tokens)
      : p_(p),
        held_(held),
        lane_(lane),
        warp_(warp),
        token_first_(token_first),
        n_tokens_(n_tokens),
        element_bytes_(p.x.x_float != nullptr ? 4 : 2),
        token_step_(kAtATime - QuotientOf(kAtATime, n_tokens) * n_tokens),
        block_step_(QuotientOf(kAtATime, n_tokens) * kParts) {
    const int n_items = warp < p.n_blocks ? ((p.n_blocks - warp - 1) / kParts + 1) * n_tokens : 0;
    n_rounds_ = (n_items + kAtATime - 1) / kAtATime;
    const int of_warp = lane / kLanes;
    const int of_block = QuotientOf(of_warp, n_tokens);
    const int token = of_warp - of_block * n_tokens;
    const int block = warp + of_block * kParts;
    const int col = block * kServingBlockCols + PieceColumn<kLanes>(lane % kLanes, 0);
    const auto* x = p.x.x_float != nullptr ? reinterpret_cast<const uint8_t*>(p.x.x_float)
                                           : reinterpret_cast<const uint8_t*>(p.x.x_bf16);
    first_ = {.x = x + ((token_first + token) * p.x.stride + col) * element_bytes_,
              .n_cols = p.x.cols - col,
              .block = block,
              .token = token};
    asm volatile("" : "+l"(first_.x), "+r"(first_.n_cols));  // here, not where it is used
    first_weight_ = LoadNormWeight<kLanes>(p.x, col);
  }

  // `loading` is called once the first activations are on their way.
  template <typename Loading>
  __device__ __forceinline__ void Run(Loading&& loading) const {
    if constexpr (F::kTransforms) {
      Transform(loading);
    } else if (p_.x.x_float != nullptr) {
      RunOf<float, kRegisterQuads / 2 / kPieceQuads<kLanes>>(loading);
    } else {
      RunOf<__nv_bfloat16, kRegisterQuads / kPieceQuads<kLanes>>(loading);
    }
    __syncwarp();
    if (!p_.x.has_norm || lane_ >= n_tokens_) return;
    float sum = 0;
    for (int block = warp_; block < p_.n_blocks; block += kParts) {
      sum += held_.squares[block * n_tokens_ + lane_];
    }
    held_.square_sums[warp_ * F::kTokens + lane_] = sum;
  }

 private:
  static constexpr int kLanes = F::kRecordLanes;
  static constexpr int kAtATime = 32 / kLanes;
  static constexpr int kRegisterQuads = 8;  // of bf16, that are on their way at a time

  // n / d of 0 ≤ n ≤ kAtATime, faster than by a division.
  static __device__ __forceinline__ int QuotientOf(int n, int d) {
    int quotient = 0;
#pragma unroll
    for (int i = 1; i <= kAtATime; ++i) quotient += n >= i * d ? 1 : 0;
    return quotient;
  }

  // A block of a token.
  struct Item {
    const uint8_t* x;  // the lane's first column
    int n_cols;        // that are left from there
    int block;         // n_blocks and more: there is none
    int token;
  };
  __device__ __forceinline__ void Advance(Item& item) const {
    int blocks = block_step_;
    int tokens = token_step_;
    if (item.token + tokens >= n_tokens_) {
      tokens -= n_tokens_;
      blocks += kParts;
    }
    item.x += (tokens * p_.x.stride + blocks * kServingBlockCols) * element_bytes_;
    item.n_cols -= blocks * kServingBlockCols;
    item.block += blocks;
    item.token += tokens;
  }

  // Loads of kRounds rounds are on their way at a time.
  template <typename T, int kRounds, typename Loading>
  __device__ __forceinline__ void RunOf(Loading&& loading) const {
    using Piece = decltype(LoadPiece<kLanes>(static_cast<const T*>(nullptr), 0));
    Item item = first_;
    ActivationPiece<kLanes> weight = first_weight_;
#pragma unroll 1
    for (int round = 0; round < n_rounds_; round += kRounds) {
      Piece pieces[kRounds];
      int records[kRounds];
      int cols[kRounds];
#pragma unroll
      for (int k = 0; k < kRounds; ++k) {
        if (round + k >= n_rounds_) break;
        pieces[k] = LoadPiece<kLanes>(reinterpret_cast<const T*>(item.x), item.n_cols);
        records[k] = RecordOf(item);
        cols[k] = p_.x.cols - item.n_cols;
        Advance(item);
      }
      if (round == 0) loading();
#pragma unroll
      for (int k = 0; k < kRounds; ++k) {
        if (round + k >= n_rounds_) break;
        if (p_.x.norm_weight != nullptr && round + k > 0) {
          weight = LoadNormWeight<kLanes>(p_.x, cols[k]);
        }
        Write<std::is_same_v<T, float>>(records[k], ToFloats(pieces[k]), weight);
      }
    }
  }
  template <typename Loading>
  __device__ __forceinline__ void Transform(Loading&& loading) const {
    Item item = first_;
#pragma unroll 1
    for (int round = 0; round < n_rounds_; ++round) {
      ActivationPiece<kLanes> piece{};
      ActivationPiece<kLanes> weight{};
      if (item.block < p_.n_blocks) {
        LoadAnyPiece(p_.x, token_first_ + item.token, item.block, lane_ % kLanes, piece, weight);
      }
      if (round == 0) loading();
      Write<false>(RecordOf(item), piece, weight);
      Advance(item);
    }
  }
  // -1: none.
  __device__ __forceinline__ int RecordOf(const Item& item) const {
    return item.block < p_.n_blocks ? item.block * n_tokens_ + item.token : -1;
  }
  // kHasNorm: takes it for granted, so that no branch keeps the squares' exchange between lanes
  // from overlapping the others.
  template <bool kHasNorm>
  __device__ __forceinline__ void Write(int record, ActivationPiece<kLanes> piece,
                                        const ActivationPiece<kLanes>& weight) const {
    const int lane = lane_ % kLanes;
    if (kHasNorm || p_.x.has_norm) {
      const float sum = SumOfSquares(piece);
      if (kHasNorm || p_.x.norm_weight != nullptr) Multiply(piece, weight);
      if (lane == 0 && record >= 0) held_.squares[record] = sum;
    }
    if constexpr (F::kTransforms) {
      if (p_.x.rotation_block != 0) RotatePiece(piece, lane, p_.x.rotation_block);
    }
    WriteRecord(piece, lane, F::kGrids, F::kShift, record >= 0,
                held_.records + record * F::kRecordBytes);
  }

  const KernelParams& p_;
  const HeldActivations& held_;
  const int lane_;
  const int warp_;
  const int token_first_;
  const int n_tokens_;
  const int element_bytes_;
  // From one item of a lane to its next.
  const int token_step_;
  const int block_step_;
  int n_rounds_;
  Item first_;
  ActivationPiece<kLanes> first_weight_;  // of the norm, which need not be waited for
};

// The B fragments of a block's records: of each slot with zeros in the columns of the others, where
// these share accumulators.
template <typename F>
struct BlockActivations {
  static constexpr int kCopies = F::kSharesAccumulators ? F::kSlots : 1;
  uint32_t b[kCopies][kServingSteps][2];
  float2 scale_sum[F::kGrids];  // of the token whose sums the lane has
};
template <typename F>
__device__ __forceinline__ void LoadActivations(const uint8_t* records, int lane, int n_tokens,
                                                BlockActivations<F>& x) {
  // A lane's columns of B are pair lane / 8 of slots and tokens, its sums those of pair lane % 4;
  // of any token where there are fewer, since nobody looks at those sums.
  const int token = min(lane / 8 % F::kSlotTokens, n_tokens - 1);
  const int slot = lane / 8 / F::kSlotTokens;
  const uint8_t* at = records + token * F::kRecordBytes + lane / 4 % 2 * 64 + lane % 4 * 16;
#pragma unroll
  for (int s = 0; s < kServingSteps; s += 2) {
    const uint4 v = *reinterpret_cast<const uint4*>(at + s / 2 * 128);
#pragma unroll
    for (int j = 0; j < x.kCopies; ++j) {
      const bool is_own = x.kCopies == 1 || slot == j;
      x.b[j][s][0] = is_own ? v.x : 0;
      x.b[j][s][1] = is_own ? v.y : 0;
      x.b[j][s + 1][0] = is_own ? v.z : 0;
      x.b[j][s + 1][1] = is_own ? v.w : 0;
    }
  }
  const uint8_t* numbers =
      records + min(lane % F::kSlotTokens, n_tokens - 1) * F::kRecordBytes + kRecordCodeBytes;
  // Selected here, once for all tiles, and not where they are used.
#pragma unroll
  for (int j = 0; j < x.kCopies; ++j) {
#pragma unroll
    for (int s = 0; s < kServingSteps; ++s) asm("" : "+r"(x.b[j][s][0]), "+r"(x.b[j][s][1]));
  }
#pragma unroll
  for (int g = 0; g < F::kGrids; ++g) {
    x.scale_sum[g] = *reinterpret_cast<const float2*>(numbers + g * 8);
  }
}

// The words and grids of kSlots tiles that a lane needs, so that their stage is free.
template <typename F>
struct HeldTiles {
  uint32_t words[F::kSlots][ServingWords(F::kBits)];
  RawGrid<F> grids[F::kGrids];  // of the tile whose sums the lane has
};
// Returns bits of each load.
template <typename F>
__device__ __forceinline__ uint32_t LoadTiles(const uint8_t* weights, int lane,
                                              HeldTiles<F>& tiles) {
  uint32_t read = 0;
#pragma unroll
  for (int j = 0; j < F::kSlots; ++j) {
    constexpr int kStepsHeld = F::kBits <= 3 ? 4 : 8 / F::kBits;
#pragma unroll
    for (int s = 0; s < kServingSteps; s += kStepsHeld) {
      uint32_t words[kWordsHeld<F>];
      LoadWords<F>(weights + j * F::kBlockBytes, lane, s, words);
#pragma unroll
      for (int w = 0; w < kWordsHeld<F>; ++w) tiles.words[j][s / kStepsHeld * 4 + w] = words[w];
      read |= words[0] | words[kWordsHeld<F> - 1];
    }
  }
#pragma unroll
  for (int g = 0; g < F::kGrids; ++g) {
    tiles.grids[g] = LoadRawGrid<F>(weights + lane % 4 / F::kSlotTokens * F::kBlockBytes, lane, g);
    read |= tiles.grids[g].v[0];
  }
  return read;
}

// total += the blocks of kSlots tiles, of which n_tiles are there, times the activations, rows i
// and i + 8. Where they share accumulators those that are not there are multiplied as they lie,
// into columns that nobody looks at.
template <typename F>
__device__ __forceinline__ void MultiplyTiles(const HeldTiles<F>& tiles, int n_tiles, int lane,
                                              const BlockActivations<F>& x, float2& total) {
#pragma unroll
  for (int g = 0; g < F::kGrids; ++g) {
    Accumulators<F> acc;
    GroupSums<F> sums;
#pragma unroll
    for (int j = 0; j < F::kSlots; ++j) {
      if (j == 2 && n_tiles <= 2) break;  // by two, whose products then overlap
      uint32_t a[F::kPlanes][F::kSteps][4];
      Expand<F>(
          g,
          [&](int s, uint32_t(&words)[kWordsHeld<F>]) {
            constexpr int kStepsHeld = F::kBits <= 3 ? 4 : 8 / F::kBits;
#pragma unroll
            for (int w = 0; w < kWordsHeld<F>; ++w)
              words[w] = tiles.words[j][s / kStepsHeld * 4 + w];
          },
          a);
#pragma unroll
      for (int plane = 0; plane < F::kPlanes; ++plane) {
#pragma unroll
        for (int k = 0; k < F::kSteps; ++k) {
          const int s = g * F::kSteps + k;
          int(&of_class)[4] = acc.v[plane][ClassOf<F>(s)];
          Mma(of_class, a[plane][k], x.b[F::kSharesAccumulators ? j : 0][s], of_class);
        }
      }
      if constexpr (!F::kSharesAccumulators) {
        const GroupSums<F> of_tile(acc, g);
        const bool is_own = lane % 4 / F::kSlotTokens == j;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int plane = 0; plane < F::kPlanes; ++plane) {
            if (j == 0 || is_own) sums.v[h][plane] = of_tile.v[h][plane];
          }
        }
        acc = {};
      }
    }
    if constexpr (F::kSharesAccumulators) sums = GroupSums<F>(acc, g);
    AddGroup<F>(GridOfRow<F>(tiles.grids[g], 0), sums.v[0], x.scale_sum[g], total.x);
    AddGroup<F>(GridOfRow<F>(tiles.grids[g], 1), sums.v[1], x.scale_sum[g], total.y);
  }
}

template <typename F>
__global__ void __launch_bounds__(F::kThreads, 2) FewTokensKernel(const KernelParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  LetNextKernelStart();
  const int lane = static_cast<int>(threadIdx.x % 32u);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32u), 0);
  const int token_first = static_cast<int>(blockIdx.y) * p.chunk_tokens;
  const int n_tokens = F::kTokens == 1 ? 1 : min(p.n_tokens - token_first, p.chunk_tokens);
  // Each CTA gets as many tiles, or one less.
  const int rest = p.n_row_tiles % static_cast<int>(gridDim.x);
  const int cta = static_cast<int>(blockIdx.x);
  const int cta_tiles = p.n_row_tiles / static_cast<int>(gridDim.x);
  const int first_tile = cta * cta_tiles + min(cta, rest);
  const int end_tile = first_tile + cta_tiles + (cta < rest ? 1 : 0);

  Ring<F> ring(p, shared, warp);
  ring.Init(p);
  FewProducer<F> producer(p, warp, first_tile, end_tile);
  const HeldActivations held{.records = shared + p.records_at,
                             .squares = reinterpret_cast<float*>(shared + p.squares_at),
                             .square_sums = reinterpret_cast<float*>(shared + p.square_sums_at)};
  // One stage after the other, so that what the kernel before still reads comes first, and the rest
  // once the activations are on their way, which would have to wait for it.
  constexpr int kStagesBefore = 3;
  int stage = 0;
  const auto copy_stage = [&] {
    producer.Copy(p, ring.address(stage), ring.barrier(stage));
    ++stage;
  };
  if (producer.has_next()) copy_stage();
  const Quantizer<F> quantizer(p, held, lane, warp, token_first, n_tokens);
#pragma unroll 1
  while (stage < min(p.n_stages, kStagesBefore) && producer.has_next()) {
    WaitBarrier(ring.barrier(stage - 1), 0);
    copy_stage();
  }
  WaitForPreviousKernel();
  if (first_tile == end_tile) return;
  float* sums = reinterpret_cast<float*>(shared + p.sums_at);
  quantizer.Run([&] {
#pragma unroll 1
    while (stage < p.n_stages && producer.has_next()) copy_stage();
  });

  float2* own = reinterpret_cast<float2*>(sums + warp * p.sums_stride) + F::SumOfLane(lane);
#pragma unroll 1
  for (int first = first_tile; first < end_tile; first += p.pass_tiles) {
    const int n_tiles = min(p.pass_tiles, end_tile - first);
    if (warp >= p.n_blocks) {
      for (int unit = 0; unit * F::kSlots < n_tiles; ++unit) {
        own[unit * F::kUnitSums] = make_float2(0, 0);
      }
    }
#pragma unroll 1
    for (int block = warp; block < p.n_blocks; block += kParts) {
      BlockActivations<F> x;
      LoadActivations<F>(held.records + block * n_tokens * F::kRecordBytes, lane, n_tokens, x);
      float2* sum = own;
#pragma unroll 1
      for (int tile = 0; tile < n_tiles; tile += F::kRowTiles) {
        const uint8_t* weights = shared + ring.oldest();

        HeldTiles<F> tiles[F::kUnits];
        ring.Wait();
        uint32_t read = 0;
#pragma unroll
        for (int u = 0; u < F::kUnits; ++u) {
          read |= LoadTiles<F>(weights + u * F::kSlots * F::kBlockBytes, lane, tiles[u]);
        }
        __syncwarp();
        if (producer.has_next()) {
          producer.Copy(p, ring.address(ring.stage()), ring.barrier(ring.stage()), read);
        }
        ring.Pop(p);
#pragma unroll
        for (int u = 0; u < F::kUnits; ++u) {
          if (u > 0 && tile + u * F::kSlots >= n_tiles) break;
          float2 total = make_float2(0, 0);
          if (block != warp) total = *sum;
          MultiplyTiles<F>(tiles[u], n_tiles - tile - u * F::kSlots, lane, x, total);
          *sum = total;
          sum += F::kUnitSums;
        }
      }
    }
    Finish<F>(p, warp, first, n_tiles, token_first, n_tokens, held.square_sums, sums);
    // Sums of the next pass go where these are.
    if (first + p.pass_tiles < end_tile) __syncthreads();
  }
}

// ---- More tokens ----

// What a warp copies next: its blocks of a group of rows, part by part, then those of its CTA's
// next group.
template <typename F>
class ManyProducer {
 public:
  __device__ __forceinline__ ManyProducer(const KernelParams& p, int warp, int token_first,
                                          int n_tokens)
      : warp_(warp),
        token_first_(token_first),
        n_tokens_(n_tokens),
        tile_(warp < p.n_blocks ? static_cast<int>(blockIdx.x) * F::kRowTiles : p.n_row_tiles),
        block_(warp),
        policy_(EvictFirst()) {}
  __device__ __forceinline__ bool has_next(const KernelParams& p) const {
    return tile_ < p.n_row_tiles;
  }
  // The barrier waits for the records too.
  __device__ __forceinline__ void CopyWeights(const KernelParams& p, uint32_t stage,
                                              uint32_t barrier) const {
    const int bytes = min(p.n_row_tiles - tile_, F::kRowTiles) * F::kBlockBytes;
    const uint8_t* from =
        p.weights + static_cast<int64_t>(block_ * p.n_row_tiles + tile_) * F::kBlockBytes;
    if (IsElected()) {
      ExpectBytes(barrier, bytes + n_tokens_ * F::kRecordBytes);
      CopyBulkOnce(stage, from, bytes, barrier, policy_);
    }
  }
  __device__ __forceinline__ void CopyRecords(const KernelParams& p, uint32_t stage,
                                              uint32_t barrier) const {
    const int64_t first = static_cast<int64_t>(block_) * p.n_tokens + token_first_;
    if (IsElected()) {
      CopyBulk(stage + F::kWeightBytes, p.records + first * F::kRecordBytes,
               n_tokens_ * F::kRecordBytes, barrier);
    }
  }
  __device__ __forceinline__ void Advance(const KernelParams& p) {
    block_ += kParts;
    if (block_ < p.n_blocks) return;
    const bool is_first_part = (block_ & kPairs) == 0;
    if (is_first_part && warp_ + kPairs < p.n_blocks) {
      block_ = warp_ + kPairs;
      return;
    }
    block_ = warp_;
    tile_ += static_cast<int>(gridDim.x) * F::kRowTiles;
  }

 private:
  const int warp_;
  const int token_first_;
  const int n_tokens_;
  int tile_;  // first of the group
  int block_;
  const uint64_t policy_;
};

// total += a group's blocks times the activations: of rows i and i + 8, a token of each tile. `x`
// and `numbers` are where a lane reads the bytes and the numbers of its records.
template <typename F>
__device__ __forceinline__ void MultiplyBlock(const uint8_t* weights, const uint8_t* x,
                                              const uint8_t* numbers, int lane,
                                              float (&total)[F::kRowTiles][F::kTokenTiles][2]) {
#pragma unroll
  for (int g = 0; g < F::kGrids; ++g) {
    uint32_t a[F::kRowTiles][F::kPlanes][F::kSteps][4];
    RowGrid<F> grid[F::kRowTiles][2];
#pragma unroll
    for (int r = 0; r < F::kRowTiles; ++r) {
      const uint8_t* block = weights + r * F::kBlockBytes;
      Expand<F>(block, lane, g, a[r]);
      const RawGrid<F> raw = LoadRawGrid<F>(block, lane, g);
      grid[r][0] = GridOfRow<F>(raw, 0);
      grid[r][1] = GridOfRow<F>(raw, 1);
    }
#pragma unroll
    for (int n = 0; n < F::kTokenTiles; ++n) {
      constexpr int kTileBytes = kTileTokens * F::kRecordBytes;
      uint32_t b[F::kSteps][2];
#pragma unroll
      for (int k = 0; k < F::kSteps; k += 2) {
        const int s = g * F::kSteps + k;
        const uint8_t* at = x + n * kTileBytes + s / 2 * 128;
        if constexpr (F::kSteps > 1) {
          const uint4 v = *reinterpret_cast<const uint4*>(at);
          b[k][0] = v.x;
          b[k][1] = v.y;
          b[k + 1][0] = v.z;
          b[k + 1][1] = v.w;
        } else {
          const uint2 v = *reinterpret_cast<const uint2*>(at + s % 2 * 8);
          b[k][0] = v.x;
          b[k][1] = v.y;
        }
      }
      const float2 scale_sum = *reinterpret_cast<const float2*>(numbers + n * kTileBytes + g * 8);
#pragma unroll
      for (int r = 0; r < F::kRowTiles; ++r) {
        Accumulators<F> acc;
#pragma unroll
        for (int plane = 0; plane < F::kPlanes; ++plane) {
#pragma unroll
          for (int k = 0; k < F::kSteps; ++k) {
            Mma(acc.v[plane][0], a[r][plane][k], b[k], acc.v[plane][0]);
          }
        }
        const GroupSums<F> sums(acc, g);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          AddGroup<F>(grid[r][h], sums.v[h], scale_sum, total[r][n][h]);
        }
      }
    }
  }
}

// The sums of squares of a warp's parts as the launch before left them.
template <typename F>
__device__ __forceinline__ void AddSquares(const KernelParams& p, int lane, int warp,
                                           int token_first, int n_tokens, float* square_sums) {
  if (lane >= n_tokens) return;
  for (int part = warp; part < kParts; part += F::kWarps) {
    float sum = 0;
    for (int block = part; block < p.n_blocks; block += kParts) {
      sum += p.square_sums[static_cast<int64_t>(block) * p.n_tokens + token_first + lane];
    }
    square_sums[part * F::kTokens + lane] = sum;
  }
}

template <typename F>
__global__ void __launch_bounds__(F::kThreads, 1) ManyTokensKernel(const KernelParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = static_cast<int>(threadIdx.x % 32u);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32u), 0);
  const int token_first = static_cast<int>(blockIdx.y) * p.chunk_tokens;
  const int n_tokens = min(p.n_tokens - token_first, p.chunk_tokens);
  float* square_sums = reinterpret_cast<float*>(shared + p.square_sums_at);
  float* sums = reinterpret_cast<float*>(shared + p.sums_at);

  Ring<F> ring(p, shared, warp);
  ring.Init(p);
  ManyProducer<F> producer(p, warp, token_first, n_tokens);
  ManyProducer<F> copied = producer;
  int n_copied = 0;
#pragma unroll 1
  for (; n_copied < p.n_stages && producer.has_next(p); ++n_copied) {
    producer.CopyWeights(p, ring.address(n_copied), ring.barrier(n_copied));
    producer.Advance(p);
  }
  WaitForPreviousKernel();
#pragma unroll 1
  for (int stage = 0; stage < n_copied; ++stage) {
    copied.CopyRecords(p, ring.address(stage), ring.barrier(stage));
    copied.Advance(p);
  }
  LetNextKernelStart();
  if (p.x.has_norm) AddSquares<F>(p, lane, warp, token_first, n_tokens, square_sums);

  // A lane's columns of B are those of token lane / 8 of a tile, its sums those of lane % 4.
  const int x_at = F::kWeightBytes + lane / 8 * F::kRecordBytes + lane / 4 % 2 * 64 + lane % 4 * 16;
  const int numbers_at = F::kWeightBytes + lane % 4 * F::kRecordBytes + kRecordCodeBytes;
  const int row_step = static_cast<int>(gridDim.x) * F::kRowTiles;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x) * F::kRowTiles; tile < p.n_row_tiles;
       tile += row_step) {
#pragma unroll 1
    for (int part = warp; part < kParts; part += F::kWarps) {
      float total[F::kRowTiles][F::kTokenTiles][2] = {};
#pragma unroll 1
      for (int block = part; block < p.n_blocks; block += kParts) {
        const uint8_t* weights = shared + ring.oldest();
        ring.Wait();
        MultiplyBlock<F>(weights, weights + x_at, weights + numbers_at, lane, total);
        __syncwarp();
        if (producer.has_next(p)) {
          producer.CopyWeights(p, ring.address(ring.stage()), ring.barrier(ring.stage()));
          producer.CopyRecords(p, ring.address(ring.stage()), ring.barrier(ring.stage()));
          producer.Advance(p);
        }
        ring.Pop(p);
      }
      float* own = sums + warp * p.sums_stride + lane / 4;
#pragma unroll
      for (int n = 0; n < F::kTokenTiles; ++n) {
        const int token = n * kTileTokens + lane % 4;
        if (token >= n_tokens) continue;
#pragma unroll
        for (int r = 0; r < F::kRowTiles; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& place = own[token * F::kTokenStride + r * kServingTileRows + h * 8];
            place = part < F::kWarps ? total[r][n][h] : __fadd_rn(place, total[r][n][h]);
          }
        }
      }
    }
    Finish<F>(p, warp, tile, F::kRowTiles, token_first, n_tokens, square_sums, sums);
    // Sums of the next rows go where these are.
    if (tile + row_step < p.n_row_tiles) __syncthreads();
  }
}

// What the caller of a launch has decided.
struct LaunchPlan {
  KernelParams params;  // what is of a form is set here
  int grids_in_block = 1;
  int token_tiles = 1;
  int row_tiles = 2;
  int n_multiprocessors = 0;
  int ctas_per_sm = 1;
  bool overlap_previous = false;
  SharedPart shared_part = SharedPart::kSmaller;
  cudaStream_t stream = nullptr;
};

inline constexpr int kSharedMax = 227 << 10;     // of a CTA; a multiprocessor has 1 KB more
inline constexpr int kSharedReserved = 1 << 10;  // of each CTA
inline constexpr int kRingMin = 64 << 10;
inline constexpr int kSumsMax = 32 << 10;
inline constexpr int kRecordsMax = 120 << 10;  // that a CTA holds
inline constexpr int kStagesMin = 2;
inline constexpr int kStagesMax = 16;

// What leaves room for the CTA of a neighbour: SharedPart's sizes fill a multiprocessor.
inline constexpr int kSharedLarger = 116 << 10;
inline constexpr int kSharedSmaller = kSharedMax - kSharedReserved - kSharedLarger;
static_assert(2 * (kSharedLarger + kSharedReserved) > kSharedMax + kSharedReserved);
inline int SharedOf(const LaunchPlan& plan) {
  return plan.shared_part == SharedPart::kLarger ? kSharedLarger : kSharedSmaller;
}

// Of a stage of every warp, with its barriers.
template <typename F>
constexpr int StageOfAll() {
  return F::kWarps * (F::kStageBytes + 8);
}
template <typename F>
constexpr int SquareSumsBytes() {
  return kParts * F::kTokens * static_cast<int>(sizeof(float));
}
// Of the records' sums of squares, in whole float2: so the sums behind them are read.
constexpr int SquaresBytes(int n_records) { return (n_records + 1) / 2 * 8; }
// What there is beside the ring and the sums.
template <typename F>
constexpr int HeldBytes(int n_records) {
  return n_records * F::kRecordBytes + SquaresBytes(n_records) + SquareSumsBytes<F>();
}
// What a ring of the fewest stages leaves for the sums.
template <typename F>
constexpr int SumsRoom(int n_records) {
  return kSharedMax - kStagesMin * StageOfAll<F>() - HeldBytes<F>(n_records);
}

// Places rings, records and sums in shared memory; returns its size, at most `budget` or what the
// least ring needs. A warp has `warp_stages` stages to multiply. The sums are within SumsRoom.
template <typename F>
int PlaceShared(int budget, int warp_stages, int n_records, KernelParams& p) {
  const int sums_bytes = F::kWarps * p.sums_stride * static_cast<int>(sizeof(float));
  const int fixed_bytes = sums_bytes + HeldBytes<F>(n_records);
  budget = std::min(std::max(budget, fixed_bytes + kRingMin), kSharedMax);
  p.n_stages = std::clamp((budget - fixed_bytes) / StageOfAll<F>(), kStagesMin, kStagesMax);
  p.n_stages = std::min(p.n_stages, warp_stages);
  p.barriers_at = F::kWarps * p.n_stages * F::kStageBytes;
  p.records_at = p.n_stages * StageOfAll<F>();
  p.squares_at = p.records_at + n_records * F::kRecordBytes;
  p.square_sums_at = p.squares_at + SquaresBytes(n_records);
  p.sums_at = p.square_sums_at + SquareSumsBytes<F>();
  return p.sums_at + sums_bytes;
}

template <typename F, auto kKernel>
absl::Status Launch(const LaunchPlan& plan, int ctas, int token_chunks, int shared_bytes,
                    const KernelParams& p) {
  WALSH_RETURN_IF_ERROR(PrepareOnce<kKernel>(kSharedMax));
  return LaunchKernel(
      "LowBitMatmul", kKernel,
      {.grid = dim3(static_cast<unsigned>(ctas), static_cast<unsigned>(token_chunks)),
       .threads = F::kThreads,
       .shared_bytes = shared_bytes,
       .overlap_previous = plan.overlap_previous,
       .stream = plan.stream},
      p);
}

template <typename F>
absl::Status LaunchFew(const LaunchPlan& plan) {
  if constexpr (!F::kTransforms) {
    if (AreTransformed(plan.params.x)) return LaunchFew<typename F::Transforming>(plan);
  }
  KernelParams p = plan.params;
  p.chunk_tokens = std::min(p.chunk_tokens, F::kTokens);
  const int token_chunks = (p.n_tokens + p.chunk_tokens - 1) / p.chunk_tokens;
  // One on each multiprocessor, also where there are fewer tiles: one that is left out would have
  // room for two CTAs of the next kernel.
  const int ctas = std::max(plan.ctas_per_sm * plan.n_multiprocessors / token_chunks, 1);
  const int cta_tiles = (p.n_row_tiles + ctas - 1) / ctas;
  const int n_tokens = std::min(p.n_tokens, p.chunk_tokens);
  const int n_records = p.n_blocks * n_tokens;
  constexpr int kUnitBytes = F::kWarps * F::kUnitFloats * static_cast<int>(sizeof(float));
  static_assert(
      std::min(kSumsMax, SumsRoom<F>(kRecordsMax / RecordBytes(4))) >= F::kUnits * kUnitBytes,
      "the row tiles of a stage have room for their sums beside the most records");
  // Passes of one size.
  const int sums_max = std::min(kSumsMax, SumsRoom<F>(n_records));
  const int tiles_max = sums_max / kUnitBytes * F::kSlots / F::kRowTiles * F::kRowTiles;
  const int n_passes = (cta_tiles + tiles_max - 1) / tiles_max;
  const int pass_tiles = (cta_tiles + n_passes - 1) / n_passes;
  p.pass_tiles = (pass_tiles + F::kRowTiles - 1) / F::kRowTiles * F::kRowTiles;
  p.sums_stride = (std::min(p.pass_tiles, cta_tiles) + F::kSlots - 1) / F::kSlots * F::kUnitFloats;
  const int part_blocks = (p.n_blocks + kParts - 1) / kParts;
  const int warp_stages =
      part_blocks * ((p.pass_tiles + F::kRowTiles - 1) / F::kRowTiles) * n_passes;
  const int budget = SharedOf(plan) / plan.ctas_per_sm;
  const int shared_bytes = std::max(PlaceShared<F>(budget, warp_stages, n_records, p), budget);
  return Launch<F, FewTokensKernel<F>>(plan, ctas, token_chunks, shared_bytes, p);
}

template <typename F>
constexpr int SumsBytesOfMany() {
  return F::kWarps * F::kTokens * F::kTokenStride * static_cast<int>(sizeof(float));
}

template <typename F>
absl::Status LaunchMany(const LaunchPlan& plan) {
  KernelParams p = plan.params;
  p.chunk_tokens = F::kTokens;
  const int token_chunks = (p.n_tokens + p.chunk_tokens - 1) / p.chunk_tokens;
  const int n_row_groups = (p.n_row_tiles + F::kRowTiles - 1) / F::kRowTiles;
  const int ctas =
      std::min(n_row_groups, std::max(plan.ctas_per_sm * plan.n_multiprocessors / token_chunks, 1));
  static_assert(SumsRoom<F>(0) >= SumsBytesOfMany<F>());
  p.sums_stride = std::min(p.n_tokens, F::kTokens) * F::kTokenStride;
  const int shared_bytes = PlaceShared<F>(kSharedMax / plan.ctas_per_sm, kStagesMax, 0, p);
  return Launch<F, ManyTokensKernel<F>>(plan, ctas, token_chunks, shared_bytes, p);
}

// The most row tiles up to kWanted whose stages fit twice beside the sums.
template <int kBits, bool kCodebook, int kGrids, int kTokenTiles, int kWanted>
constexpr int RowTilesThatFit() {
  using F = ManyForm<kBits, kCodebook, kGrids, kTokenTiles, kWanted>;
  constexpr bool kFits = SumsRoom<F>(0) >= SumsBytesOfMany<F>();
  if constexpr (kWanted > 1 && (!kFits || (kCodebook && kWanted > 2))) {
    return RowTilesThatFit<kBits, kCodebook, kGrids, kTokenTiles, kWanted / 2>();
  } else {
    return kWanted;
  }
}

template <int kBits, bool kCodebook, int kGrids>
absl::Status LaunchGrids(const LaunchPlan& plan) {
  const auto many_tokens = [&]<int kTokenTiles, int kRowTiles>() {
    constexpr int kFits = RowTilesThatFit<kBits, kCodebook, kGrids, kTokenTiles, kRowTiles>();
    return LaunchMany<ManyForm<kBits, kCodebook, kGrids, kTokenTiles, kFits>>(plan);
  };
  const bool has_many_rows = plan.row_tiles > 2;
  switch (plan.token_tiles) {
    case 1:
      break;
    case 2:
      return has_many_rows ? many_tokens.template operator()<2, 4>()
                           : many_tokens.template operator()<2, 2>();
    default:
      return has_many_rows ? many_tokens.template operator()<4, 4>()
                           : many_tokens.template operator()<4, 2>();
  }
  const auto few_tokens = [&]<int kRowTiles, int kSlots, int kTokens>() {
    return LaunchFew<FewForm<kBits, kCodebook, kGrids, kRowTiles, kSlots, kTokens>>(plan);
  };
  const int n_tokens = plan.params.n_tokens;
  // Stages of about 2 KB.
  if constexpr (kBits == 8) {
    return n_tokens == 1 ? few_tokens.template operator()<1, 1, 1>()
                         : few_tokens.template operator()<1, 1, 4>();
  } else {
    if (n_tokens > 2) return few_tokens.template operator()<2, 1, 4>();
    if constexpr (kBits == 2 && !kCodebook) {
      if (has_many_rows) {
        return n_tokens == 1 ? few_tokens.template operator()<4, 4, 1>()
                             : few_tokens.template operator()<4, 2, 2>();
      }
    }
    return n_tokens == 1 ? few_tokens.template operator()<2, 2, 1>()
                         : few_tokens.template operator()<2, 2, 2>();
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
