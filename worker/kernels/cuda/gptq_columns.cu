// The sequential columns of GPTQ: one fused kernel per 128-column block.
//
// A CTA takes 32 rows (16 of few) through the block, 32 columns at a time. Those 32 are sequential:
// one warp does them, a lane a row, with the row's weights in registers, so that no instruction is
// done twice and nothing is exchanged between lanes. All warps then take the errors of the 32 from
// the rest of the block as a small matrix product, and they share the clip search of the rows.
// GPTAQ's correction is a second such product, of the weights that were quantized.
//
// Bound: latency, a chain of seven dependent operations for each of 128 columns; with clip search
// the special functions of group_grid.cuh, by far. Bytes are negligible beside the trailing GEMM.
#include <cuda_pipeline.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/group_grid.cuh"
#include "worker/kernels/cuda/tf32.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSlice = kWarpSize;  // columns that one warp does in sequence
constexpr int kSlices = kGptqBlock / kSlice;
// Rows of 16 bytes more than 128 columns: lanes that read one column of 32 rows, 16 bytes each,
// then meet no bank twice.
constexpr int kRowStride = kGptqBlock + 4;
// The trailing update is a product by 3×TF32 (tf32x3.h) in one: what stands on its left is
// [low, high, high], on its right [high, low, high].
constexpr int kTermWidth = 3 * kGptqBlock;
constexpr int kTiles = kSlices * (kSlices + 1) / 2;  // of a block, on and above the diagonal

// What the columns after one get of it: nothing, its error, or that and GPTAQ's correction.
enum class Feedback { kNone, kError, kCorrected };

struct BlockArgs {
  int64_t rows;
  int64_t cols;
  int64_t first_col;
  int n_cols;  // of this block, a multiple of 32
  float* w;    // [rows, cols], columns in `perm` order, updated by earlier blocks
  const float* u;
  const float* correction;
  const int32_t* perm;
  int group_size;
  int64_t groups;  // of a row
  float max_code;
  bool symmetric;
  bool mse_clip;
  uint8_t* codes;
  float* scales;
  uint8_t* zeros;
  // [rows, term_width]: errors of the block's columns, as three terms, and with a correction the
  // negated weights that were quantized, likewise.
  float* terms;
  int64_t term_width;
  float* loss;
};

__global__ void GatherColumns(const float* w, const int32_t* perm, const uint8_t* dead,
                              int64_t rows, int64_t cols, float* out) {
  const int64_t row = blockIdx.y;
  for (int64_t c = blockIdx.x * blockDim.x + threadIdx.x; c < cols; c += gridDim.x * blockDim.x) {
    const int32_t source = perm[c];
    const bool is_dead = dead != nullptr && dead[source] != 0;
    out[row * cols + c] = is_dead ? 0.0f : w[row * cols + source];
  }
}

// The right side of a block's trailing update, transposed: tensor cores take TF32 with the summed
// dimension contiguous. terms[j] is U[first_row + 0 … 127, first_col + j]. A CTA takes 32 × 32.
__global__ void SplitFactor(const float* u, int64_t cols, int64_t first_row, int64_t first_col,
                            float* terms, int64_t term_width) {
  __shared__ float tile[kWarpSize][kWarpSize + 1];
  const int lane = threadIdx.x;
  const int64_t row0 = first_row + blockIdx.y * kWarpSize;
  const int64_t col0 = first_col + static_cast<int64_t>(blockIdx.x) * kWarpSize;
  for (int r = threadIdx.y; r < kWarpSize; r += blockDim.y) {
    tile[r][lane] = u[(row0 + r) * cols + col0 + lane];
  }
  __syncthreads();
  for (int c = threadIdx.y; c < kWarpSize; c += blockDim.y) {
    float* out = terms + (col0 - first_col + c) * term_width + blockIdx.y * kWarpSize + lane;
    const float value = tile[lane][c];
    const float high = RoundToTf32(value);
    out[0] = high;
    out[kGptqBlock] = RoundToTf32(value - high);
    out[2 * kGptqBlock] = high;
  }
}

// Grids of groups that are wider than a block, at the group's first column. One CTA per row.
__global__ void __launch_bounds__(kThreads)
    WideGroupGrid(const float* w, const int32_t* perm, int64_t cols, int64_t first_col,
                  int64_t group_size, float max_code, bool symmetric, bool mse_clip, float* scales,
                  uint8_t* zeros) {
  constexpr int kParts = kThreads / kClipLanes;  // of the group, each with all steps
  __shared__ float sums[kParts][kClipSteps];
  __shared__ float scratch[kWarps];
  const int64_t row = blockIdx.x;
  const float* values = w + row * cols + first_col;
  const int n = static_cast<int>(group_size);
  float low = 0.0f;
  float high = 0.0f;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    low = fminf(low, values[i]);
    high = fmaxf(high, values[i]);
  }
  low = BlockReduce<Min>(low, scratch);
  high = BlockReduce<Max>(high, scratch);
  const ClipSearch search(low, high, max_code, symmetric);
  ClipChoice best;
  if (mse_clip) {
    const int part = threadIdx.x / kClipLanes;
    for (int step = threadIdx.x % kClipLanes; step < kClipSteps; step += kClipLanes) {
      const GroupGrid grid = search.Grid(step);
      float error = 0.0f;
      for (int i = 4 * part; i < n; i += 4 * kParts) {
        error = search.AddErrors<4>(values + i, grid, error);
      }
      sums[part][step] = error;
    }
    __syncthreads();
    if (threadIdx.x >= kWarpSize) return;
    for (int step = threadIdx.x; step < kClipSteps; step += kWarpSize) {
      float error = 0.0f;
      for (int i = 0; i < kParts; ++i) error += sums[i][step];
      error *= search.ErrorUnit(search.Grid(step));
      if (error < best.error) best = {error, step};
    }
    best = BestChoice<kWarpSize>(best);
  }
  if (threadIdx.x == 0) {
    const GroupGrid chosen = search.Chosen(best.step);
    const int64_t group = row * (cols / group_size) + perm[first_col] / group_size;
    scales[group] = chosen.scale;
    zeros[group] = static_cast<uint8_t>(chosen.zero);
  }
}

// threadIdx.x, read anew by each step of QuantizeBlock: kept from one to the next, what is derived
// from it would be spilled by QuantizeSlice, which needs all registers there are.
__device__ __forceinline__ int Thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// What a CTA of kRows rows keeps in shared memory.
template <int kRows>
struct alignas(16) RowTile {
  // Weights; from the left they become the errors of columns that are done.
  float w[kRows][kRowStride];
  uint32_t codes[kRows][kRowStride / 4];  // four of a row in a word
  GroupGrid grid[kRows];                  // of the group that is worked on
};
// The block of U or P by tiles of 32 × 32, those on and above the diagonal, row by row.
using Tile = float[kSlice][kSlice];
struct alignas(16) FactorTiles {
  Tile tile[kTiles];
  float inverse_diagonal[kSlice];  // of the slice that is worked on
};
constexpr int kSliceStride = kSlice + 4;  // for the same reason as kRowStride
template <int kRows>
struct alignas(16) CorrectionTiles {
  Tile tile[kTiles];
  float weights[kRows][kSliceStride];  // of the slice that is worked on, as they were quantized
};
// Scale and zero of each column's group, exact in half precision, of the slice that is worked on.
template <int kRows>
struct alignas(16) StaticGrids {
  __half2 grid[kRows][kSlice + 1];
};
__device__ __forceinline__ int TileIndex(int slice_row, int slice_col) {
  return slice_row * kSlices - slice_row * (slice_row + 1) / 2 + slice_col;
}

// Whole blocks are read and written a row a warp, four columns a lane.
template <int kRows>
__device__ void LoadWeights(const BlockArgs& args, int64_t row0, RowTile<kRows>& tile) {
  const int thread = Thread();
  const int c = 4 * (thread % kWarpSize);
  for (int r = thread / kWarpSize; r < kRows; r += kWarps) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row0 + r < args.rows && c < args.n_cols) {
      four = *reinterpret_cast<const float4*>(args.w + (row0 + r) * args.cols + args.first_col + c);
    }
    *reinterpret_cast<float4*>(&tile.w[r][c]) = four;
  }
}

// Starts to copy the block of `u`; it is there after __pipeline_wait_prior(0) and a barrier.
__device__ void LoadTiles(const BlockArgs& args, const float* u, Tile* tiles) {
  const int thread = Thread();
  const int c = 4 * (thread % kWarpSize);
  for (int r = thread / kWarpSize; r < args.n_cols; r += kWarps) {
    if (c < r / kSlice * kSlice || c >= args.n_cols) continue;
    __pipeline_memcpy_async(&tiles[TileIndex(r / kSlice, c / kSlice)][r % kSlice][c % kSlice],
                            u + (args.first_col + r) * args.cols + args.first_col + c,
                            sizeof(float4));
  }
  __pipeline_commit();
}

// The grids of the group that begins at column `first` of the block.
template <int kRows>
__device__ void SetGrids(const BlockArgs& args, int64_t row0, int first, RowTile<kRows>& tile) {
  const int thread = Thread();
  const int64_t group = args.perm[args.first_col + first] / args.group_size;
  if (args.group_size > kGptqBlock) {
    const int64_t row = row0 + thread;
    if (thread < kRows && row < args.rows) {
      const float scale = args.scales[row * args.groups + group];
      tile.grid[thread] = {scale, 1.0f / scale,
                           static_cast<float>(args.zeros[row * args.groups + group])};
    }
    return;
  }
  for (int r = thread / kClipLanes; r < kRows; r += kThreads / kClipLanes) {
    const GroupGrid grid = HalfWarpGrid(thread % kClipLanes, &tile.w[r][first], args.group_size,
                                        args.max_code, args.symmetric, args.mse_clip);
    if (thread % kClipLanes != 0) continue;
    tile.grid[r] = grid;
    if (row0 + r < args.rows) {
      args.scales[(row0 + r) * args.groups + group] = grid.scale;
      args.zeros[(row0 + r) * args.groups + group] = static_cast<uint8_t>(grid.zero);
    }
  }
}

// Rounds 32 columns to the nearest codes.
template <int kRows>
__device__ void RoundSlice(const BlockArgs& args, int first, RowTile<kRows>& tile) {
  const int thread = Thread();
  const int r = thread % kWarpSize;
  if (r >= kRows) return;
  const int c = first + 4 * (thread / kWarpSize);
  const GroupGrid grid = tile.grid[r];
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = QuantizeToCode(tile.w[r][c + i], grid, args.max_code);
    word |= static_cast<uint32_t>(code) << (8 * i);
  }
  tile.codes[r][c / 4] = word;
}

__device__ __forceinline__ GroupGrid StaticGrid(__half2 stored) {
  const float scale = __low2float(stored);
  return {scale, 1.0f / scale, __high2float(stored)};
}

// The grids of the slice at column `first`, where each column has its own group's.
template <int kRows>
__device__ void SetStaticGrids(const BlockArgs& args, int64_t row0, int first,
                               StaticGrids<kRows>& grids) {
  const int thread = Thread();
  const int c = thread % kSlice;
  const int64_t group = args.perm[args.first_col + first + c] / args.group_size;
  for (int r = thread / kSlice; r < kRows; r += kThreads / kSlice) {
    const int64_t at = (row0 + r) * args.groups + group;
    grids.grid[r][c] = row0 + r < args.rows
                           ? __floats2half2_rn(args.scales[at], static_cast<float>(args.zeros[at]))
                           : __floats2half2_rn(1.0f, 0.0f);
  }
}

// Takes one row through 32 columns: codes, and errors in place of the weights. With kCorrects
// `quantized` gets the weights as they were quantized; what a column adds to those after it does
// not wait for its error, and comes first.
//
// Where tile.cc divides by the scale and by U's diagonal, this multiplies by their reciprocals.
// That is at most twice the rounding error of the quotients, so that codes differ at ties alone.
template <bool kCorrects, bool kStatic>
__device__ __forceinline__ void QuantizeSlice(float* __restrict__ row, uint32_t* __restrict__ codes,
                                              const GroupGrid group_grid,
                                              const __half2* __restrict__ static_grids,
                                              float max_code, const float (*__restrict__ u)[kSlice],
                                              const float* __restrict__ inverse_diagonal,
                                              const float (*__restrict__ correction)[kSlice],
                                              float* __restrict__ quantized) {
  float w[kSlice];
#pragma unroll
  for (int j = 0; j < kSlice; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + j);
    w[j] = four.x;
    w[j + 1] = four.y;
    w[j + 2] = four.z;
    w[j + 3] = four.w;
  }
  uint32_t words[kSlice / 4] = {};
  [[maybe_unused]] float four[4];
#pragma unroll
  for (int i = 0; i < kSlice; ++i) {
    const GroupGrid grid = kStatic ? StaticGrid(static_grids[i]) : group_grid;
    const float first_code = kRounding - grid.zero;
    const float last_code = first_code + max_code;
    const auto zero = static_cast<uint32_t>(grid.zero);
    // kRounding + (code − zero): its last bits are those of the integer.
    const float rounded =
        fminf(fmaxf(fmaf(w[i], grid.inverse_scale, kRounding), first_code), last_code);
    const float error = fmaf(-grid.scale, rounded - kRounding, w[i]) * inverse_diagonal[i];
    if constexpr (kCorrects) {
      four[i % 4] = w[i];
      if (i % 4 == 3) {
        *reinterpret_cast<float4*>(quantized + i - 3) =
            make_float4(four[0], four[1], four[2], four[3]);
      }
#pragma unroll
      for (int j = i + 1; j < kSlice; ++j) w[j] = fmaf(w[i], correction[i][j], w[j]);
    }
    w[i] = error;
#pragma unroll
    for (int j = i + 1; j < kSlice; ++j) w[j] = fmaf(-error, u[i][j], w[j]);
    const uint32_t code = (__float_as_uint(rounded) + zero) & 0xffu;
    words[i / 4] |= code << (8 * (i % 4));
  }
#pragma unroll
  for (int j = 0; j < kSlice; j += 4) {
    *reinterpret_cast<float4*>(row + j) = make_float4(w[j], w[j + 1], w[j + 2], w[j + 3]);
    codes[j / 4] = words[j / 4];
  }
}

// sum += left · right for 32 columns of `left`, of which every eighth row is taken, and four of a
// tile from `c` on; with kSubtracts, −=. In the order of the 32.
template <int kRows, int kStride, bool kSubtracts>
__device__ __forceinline__ void AddProduct(const float* left, const float (*right)[kSlice], int c,
                                           float4 (&sum)[kRows / 8]) {
#pragma unroll 2
  for (int k = 0; k < kSlice; k += 4) {
    float factor[kRows / 8][4];
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(left + 8 * i * kStride + k);
      factor[i][0] = kSubtracts ? -four.x : four.x;
      factor[i][1] = kSubtracts ? -four.y : four.y;
      factor[i][2] = kSubtracts ? -four.z : four.z;
      factor[i][3] = kSubtracts ? -four.w : four.w;
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const float4 four = *reinterpret_cast<const float4*>(&right[k + kk][c]);
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        sum[i].x = fmaf(factor[i][kk], four.x, sum[i].x);
        sum[i].y = fmaf(factor[i][kk], four.y, sum[i].y);
        sum[i].z = fmaf(factor[i][kk], four.z, sum[i].z);
        sum[i].w = fmaf(factor[i][kk], four.w, sum[i].w);
      }
    }
  }
}

// Takes the errors of the slice at column `first` from the block's columns after it, and with
// kCorrects adds its corrections. Two warps have 32 columns, a thread four of them in every eighth
// row. Errors are taken in the order of their columns, as if each had been when it arose.
template <int kRows, bool kCorrects>
__device__ void UpdateColumns(int first, int n_cols, const FactorTiles& factor,
                              const CorrectionTiles<kRows>& correction, RowTile<kRows>& tile) {
  const int thread = Thread();
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int slice = first / kSlice + 1 + warp / 2;
  if (slice * kSlice >= n_cols) return;
  const int row = lane / 8 + 4 * (warp % 2);
  const int c = 4 * (lane % 8);
  const int index = TileIndex(first / kSlice, slice);
  float4 sum[kRows / 8];
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    sum[i] = *reinterpret_cast<const float4*>(&tile.w[row + 8 * i][slice * kSlice + c]);
  }
  AddProduct<kRows, kRowStride, true>(&tile.w[row][first], factor.tile[index], c, sum);
  if constexpr (kCorrects) {
    AddProduct<kRows, kSliceStride, false>(correction.weights[row], correction.tile[index], c, sum);
  }
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    *reinterpret_cast<float4*>(&tile.w[row + 8 * i][slice * kSlice + c]) = sum[i];
  }
}

// Four values as the left side of the trailing update.
__device__ __forceinline__ void StoreTerms(const float4& value, float* terms) {
  const float4 high = make_float4(RoundToTf32(value.x), RoundToTf32(value.y), RoundToTf32(value.z),
                                  RoundToTf32(value.w));
  const float4 low = make_float4(RoundToTf32(value.x - high.x), RoundToTf32(value.y - high.y),
                                 RoundToTf32(value.z - high.z), RoundToTf32(value.w - high.w));
  *reinterpret_cast<float4*>(terms) = low;
  *reinterpret_cast<float4*>(terms + kGptqBlock) = high;
  *reinterpret_cast<float4*>(terms + 2 * kGptqBlock) = high;
}

// The weights of the slice at column `first` to the trailing update, which subtracts.
template <int kRows>
__device__ void StoreQuantized(const BlockArgs& args, int64_t row0, int first,
                               const CorrectionTiles<kRows>& correction) {
  const int thread = Thread();
  const int r = thread / (kSlice / 4);
  const int c = 4 * (thread % (kSlice / 4));
  if (r >= kRows || row0 + r >= args.rows) return;
  const float4 w = *reinterpret_cast<const float4*>(&correction.weights[r][c]);
  StoreTerms(make_float4(-w.x, -w.y, -w.z, -w.w),
             args.terms + (row0 + r) * args.term_width + kTermWidth + first + c);
}

// Codes to their columns in natural order, errors to the trailing update and, squared, to the loss.
template <int kRows, Feedback kFeedback>
__device__ void StoreBlock(const BlockArgs& args, int64_t row0, const RowTile<kRows>& tile) {
  const int thread = Thread();
  const int c = thread % kGptqBlock;
  if (c < args.n_cols) {
    const int32_t column = args.perm[args.first_col + c];
    for (int r = thread / kGptqBlock; r < kRows && row0 + r < args.rows;
         r += kThreads / kGptqBlock) {
      const auto* codes = reinterpret_cast<const uint8_t*>(tile.codes[r]);
      args.codes[(row0 + r) * args.cols + column] = codes[c];
    }
  }
  if constexpr (kFeedback != Feedback::kNone) {
    const int lane = thread % kWarpSize;
    for (int r = thread / kWarpSize; r < kRows && row0 + r < args.rows; r += kWarps) {
      float loss = 0.0f;
      if (4 * lane < args.n_cols) {
        const float4 error = *reinterpret_cast<const float4*>(&tile.w[r][4 * lane]);
        StoreTerms(error, args.terms + (row0 + r) * args.term_width + 4 * lane);
        loss = error.x * error.x + error.y * error.y + error.z * error.z + error.w * error.w;
      }
      loss = WarpReduce<Sum>(loss);
      if (lane == 0 && args.loss != nullptr) args.loss[row0 + r] += loss;
    }
  }
}

// Shared memory of a CTA: a RowTile, FactorTiles, CorrectionTiles, StaticGrids, those that there
// are.
template <int kRows, Feedback kFeedback, bool kStatic>
struct SharedLayout {
  static constexpr size_t kFactor = sizeof(RowTile<kRows>);
  static constexpr size_t kCorrection =
      kFactor + (kFeedback == Feedback::kNone ? 0 : sizeof(FactorTiles));
  static constexpr size_t kGrids =
      kCorrection + (kFeedback == Feedback::kCorrected ? sizeof(CorrectionTiles<kRows>) : 0);
  static constexpr size_t kBytes = kGrids + (kStatic ? sizeof(StaticGrids<kRows>) : 0);
};

// With kStatic all grids are there.
template <int kRows, Feedback kFeedback, bool kStatic>
__global__ void __launch_bounds__(kThreads, 2) QuantizeBlock(const BlockArgs args) {
  constexpr bool kRounds = kFeedback == Feedback::kNone;
  constexpr bool kCorrects = kFeedback == Feedback::kCorrected;
  using Layout = SharedLayout<kRows, kFeedback, kStatic>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto& tile = *reinterpret_cast<RowTile<kRows>*>(shared);
  auto& factor = *reinterpret_cast<FactorTiles*>(shared + Layout::kFactor);
  auto& correction = *reinterpret_cast<CorrectionTiles<kRows>*>(shared + Layout::kCorrection);
  auto& grids = *reinterpret_cast<StaticGrids<kRows>*>(shared + Layout::kGrids);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  if constexpr (!kRounds) LoadTiles(args, args.u, factor.tile);
  if constexpr (kCorrects) LoadTiles(args, args.correction, correction.tile);
  LoadWeights(args, row0, tile);
  __syncthreads();

  int next_group = 0;
  for (int first = 0; first < args.n_cols; first += kSlice) {
    if (kStatic || first == next_group) {
      next_group += args.group_size;
      if constexpr (kStatic) {
        SetStaticGrids(args, row0, first, grids);
      } else {
        SetGrids(args, row0, first, tile);
      }
      if constexpr (!kRounds) __pipeline_wait_prior(0);
      __syncthreads();
    }
    if constexpr (kRounds) {
      RoundSlice(args, first, tile);
    } else {
      if (const int lane = Thread(); lane < kWarpSize) {
        const int diagonal = TileIndex(first / kSlice, first / kSlice);
        const float(*u)[kSlice] = factor.tile[diagonal];
        factor.inverse_diagonal[lane] = 1.0f / u[lane][lane];
        __syncwarp();
        if (lane < kRows) {
          QuantizeSlice<kCorrects, kStatic>(&tile.w[lane][first], &tile.codes[lane][first / 4],
                                            tile.grid[lane], kStatic ? grids.grid[lane] : nullptr,
                                            args.max_code, u, factor.inverse_diagonal,
                                            kCorrects ? correction.tile[diagonal] : nullptr,
                                            kCorrects ? correction.weights[lane] : nullptr);
        }
      }
      __syncthreads();
      if constexpr (kCorrects) StoreQuantized(args, row0, first, correction);
      UpdateColumns<kRows, kCorrects>(first, args.n_cols, factor, correction, tile);
    }
    __syncthreads();
  }
  StoreBlock<kRows, kFeedback>(args, row0, tile);
}

template <int kRows, Feedback kFeedback, bool kStatic>
absl::Status LaunchBlock(const BlockArgs& args, cudaStream_t stream) {
  constexpr size_t kShared = SharedLayout<kRows, kFeedback, kStatic>::kBytes;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(QuantizeBlock<kRows, kFeedback, kStatic>,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(kShared)));
  const auto grid = static_cast<unsigned>((args.rows + kRows - 1) / kRows);
  QuantizeBlock<kRows, kFeedback, kStatic><<<grid, kThreads, kShared, stream>>>(args);
  return LaunchStatus("QuantizeBlock", stream);
}

template <Feedback kFeedback, bool kStatic>
absl::Status LaunchBlock(Context& context, const BlockArgs& args) {
  // Few rows are spread over more multiprocessors.
  if (args.rows <= int64_t{16} * context.properties().multiProcessorCount) {
    return LaunchBlock<16, kFeedback, kStatic>(args, context.stream());
  }
  return LaunchBlock<32, kFeedback, kStatic>(args, context.stream());
}

absl::Status LaunchBlock(Context& context, const BlockArgs& args, bool has_grids) {
  if (args.u == nullptr) return LaunchBlock<Feedback::kNone, false>(context, args);
  if (args.correction == nullptr) {
    return has_grids ? LaunchBlock<Feedback::kError, true>(context, args)
                     : LaunchBlock<Feedback::kError, false>(context, args);
  }
  return has_grids ? LaunchBlock<Feedback::kCorrected, true>(context, args)
                   : LaunchBlock<Feedback::kCorrected, false>(context, args);
}

absl::Status Validate(const QuantizeColumnsParams& p) {
  if (p.cols % kSlice != 0) {
    return absl::InvalidArgumentError(absl::StrCat("cols: ", p.cols, " is not a multiple of 32"));
  }
  if (p.bits != 2 && p.bits != 3 && p.bits != 4 && p.bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat("bits: ", p.bits, ", must be 2, 3, 4 or 8"));
  }
  const int64_t g = p.group_size;
  const bool fits = g > 0 && (g == 32 || g == 64 || g % kGptqBlock == 0 || g == p.cols);
  if (!fits || p.cols % g != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("group_size: ", g, " does not fit ", p.cols, " columns"));
  }
  return absl::OkStatus();
}

// The device memory of a call.
struct Buffers {
  float* w;             // [rows, cols], in the order of the columns
  float* row_terms;     // [rows, term_width]
  float* factor_terms;  // [cols, term_width]
  int64_t term_width;
};

// W[:, first_col:] −= error · U − quantized · P, of a block that ends there. Seen column-major: all
// transposed.
absl::Status UpdateTrailing(Context& context, const BlockArgs& block, const Buffers& buffers) {
  const int64_t first_col = block.first_col + block.n_cols;
  const int64_t rest = block.cols - first_col;
  if (rest == 0) return absl::OkStatus();
  const cudaStream_t stream = context.stream();
  const dim3 tiles(static_cast<unsigned>(rest / kWarpSize), kGptqBlock / kWarpSize);
  const dim3 threads(kWarpSize, 8);
  SplitFactor<<<tiles, threads, 0, stream>>>(block.u, block.cols, block.first_col, first_col,
                                             buffers.factor_terms, buffers.term_width);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("SplitFactor", stream);
  if (block.correction != nullptr) {
    SplitFactor<<<tiles, threads, 0, stream>>>(block.correction, block.cols, block.first_col,
                                               first_col, buffers.factor_terms + kTermWidth,
                                               buffers.term_width);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("SplitFactor of the correction", stream);
  }
  const float minus_one = -1.0f;
  const float one = 1.0f;
  const auto n_terms = static_cast<int>(buffers.term_width);
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(
      context.blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(rest),
      static_cast<int>(block.rows), n_terms, &minus_one, buffers.factor_terms, CUDA_R_32F, n_terms,
      buffers.row_terms, CUDA_R_32F, n_terms, &one, buffers.w + first_col, CUDA_R_32F,
      static_cast<int>(block.cols), CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
  return absl::OkStatus();
}

// All columns in the order of `p.perm`; with `has_grids` on those in the outputs.
absl::Status QuantizeInOrder(Context& context, const QuantizeColumnsParams& p, bool has_grids,
                             const Buffers& buffers) {
  const cudaStream_t stream = context.stream();
  const dim3 gather_grid(static_cast<unsigned>(std::min<int64_t>((p.cols + 255) / 256, 64)),
                         static_cast<unsigned>(p.rows));
  GatherColumns<<<gather_grid, 256, 0, stream>>>(p.w, p.perm, p.dead, p.rows, p.cols, buffers.w);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherColumns", stream);
  const auto max_code = static_cast<float>((1 << p.bits) - 1);
  for (int64_t c0 = 0; c0 < p.cols; c0 += kGptqBlock) {
    // QuantizeBlock takes the grids of narrower groups itself.
    if (!has_grids && p.group_size > kGptqBlock && c0 % p.group_size == 0) {
      // Wide groups are sets of adjacent positions: `perm` keeps a group together.
      WideGroupGrid<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
          buffers.w, p.perm, p.cols, c0, p.group_size, max_code, p.symmetric, p.mse_clip, p.scales,
          p.zeros);
      WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("WideGroupGrid", stream);
    }
    const BlockArgs block{.rows = p.rows,
                          .cols = p.cols,
                          .first_col = c0,
                          .n_cols = static_cast<int>(std::min<int64_t>(kGptqBlock, p.cols - c0)),
                          .w = buffers.w,
                          .u = p.u,
                          .correction = p.correction,
                          .perm = p.perm,
                          .group_size = static_cast<int>(p.group_size),
                          .groups = p.cols / p.group_size,
                          .max_code = max_code,
                          .symmetric = p.symmetric,
                          .mse_clip = p.mse_clip,
                          .codes = p.codes,
                          .scales = p.scales,
                          .zeros = p.zeros,
                          .terms = buffers.row_terms,
                          .term_width = buffers.term_width,
                          .loss = p.loss};
    WALSH_RETURN_IF_ERROR(LaunchBlock(context, block, has_grids));
    if (p.u != nullptr) WALSH_RETURN_IF_ERROR(UpdateTrailing(context, block, buffers));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status QuantizeColumns(Context& context, const QuantizeColumnsParams& params) {
  WALSH_RETURN_IF_ERROR(Validate(params));
  if (params.rows == 0 || params.cols == 0) return absl::OkStatus();
  const cudaStream_t stream = context.stream();
  const bool corrects = params.u != nullptr && params.correction != nullptr;
  const int64_t term_width = corrects ? 2 * kTermWidth : kTermWidth;
  WALSH_ASSIGN_OR_RETURN(auto w, DeviceBuffer<float>::Allocate(params.rows * params.cols, stream));
  WALSH_ASSIGN_OR_RETURN(
      auto terms, DeviceBuffer<float>::Allocate((params.rows + params.cols) * term_width, stream));
  const Buffers buffers{.w = w.data(),
                        .row_terms = terms.data(),
                        .factor_terms = terms.data() + params.rows * term_width,
                        .term_width = term_width};
  if (params.loss != nullptr) {
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(params.loss, 0, static_cast<size_t>(params.rows) * sizeof(float), stream));
  }
  const bool has_static_groups = params.static_groups != nullptr;
  if (has_static_groups) {
    // Rounding to nearest chooses the grids; its codes last where there is no factor.
    QuantizeColumnsParams rounding = params;
    rounding.perm = params.static_groups;
    rounding.u = nullptr;
    WALSH_RETURN_IF_ERROR(QuantizeInOrder(context, rounding, /*has_grids=*/false, buffers));
    if (params.u == nullptr) return absl::OkStatus();
  }
  return QuantizeInOrder(context, params, has_static_groups, buffers);
}

}  // namespace walsh::kernels::cuda
