// Causal attention over calibration windows: FlashAttention-2's loop with mma.sync.
//
// Source:  Dao 2023, "FlashAttention-2" (arXiv 2307.08691), algorithm 1.
// A CTA takes 128 queries of one head; keys and values pass through shared memory 64 at a time.
// A warp has two tiles of 16 queries, one in either half of the CTA's, so that a fragment of keys
// or values that it loads feeds two products, and all warps have the same work at the diagonal.
// Scores live in registers only: the accumulator fragment of Q Kᵀ is at once the operand fragment
// of P V. Keys beyond the diagonal block are not visited.
//
// Bound: tensor cores, 4 · window² / 2 · head_dim flop a head and window. mma.sync reaches some
// 60 % of what wgmma does on sm_90, and is there from sm_80 on.
#include <climits>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr int kTileRows = 16;                                   // queries of an mma's accumulator
constexpr int kTiles = 2;                                       // of a warp
constexpr int kKeys = 64;                                       // of a step
constexpr int kQueries = kTiles * kAttentionWarps * kTileRows;  // of a CTA
static_assert(kQueries == kTiles * kKeys, "a step's keys are those of one tile's diagonal");
// Heads whose CTAs follow one another, those with the most keys first: enough for the short ones to
// fill the end, few enough for their keys and values to stay in the second-level cache.
constexpr int kHeadsTogether = 16;

// Starts the copy of rows [first, first + kRows) of one head's keys, values or queries to shared
// memory, zeros past the end. `tile` is the whole tile's address.
template <int kDim, int kRows>
__device__ __forceinline__ void LoadTile(unsigned tile, const bf16* base, int stride, int first,
                                         int n_rows) {
  constexpr int kPieces = kDim / 8;
  constexpr int kRowsAtOnce = kAttentionThreads / kPieces;
  static_assert(kRows % kRowsAtOnce == 0);
  const int first_row = static_cast<int>(threadIdx.x) / kPieces;
  const int column = static_cast<int>(threadIdx.x) % kPieces * 8;
  const bf16* from = base + static_cast<int64_t>(first + first_row) * stride + column;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const bool valid = first + first_row + i < n_rows;
    CopyAsync16(tile + TileBytes<kDim>(first_row + i, column), valid ? from : base, valid);
    from += kRowsAtOnce * stride;
  }
}

// What a warp holds of its queries; elements of tiles as in mma's accumulator: row lane / 4 + 8 h,
// columns 8 n + lane % 4 · 2 + {0, 1} for element 2 h + {0, 1} of fragment n.
template <int kDim>
struct WarpQueries {
  float out[kTiles][kDim / 8][4];  // Σ of p v, not normalized
  float row_max[kTiles][2];        // of scores before scaling
  float row_sum[kTiles][2];        // of this lane's columns
};

// One head's tensors and the CTA's tiles of them in shared memory.
struct HeadTiles {
  const bf16* k;
  const bf16* v;
  int kv_stride;
  int window;
  int keys_end;  // of the CTA's queries
  int warp_row;  // of the warp's first tile among the queries; the next tile's is kKeys further
  unsigned k_tile;
  unsigned v_tile;
  // Where this lane's rows of the warp's operands begin, for ldmatrix.
  unsigned q_lane;
  unsigned k_lane;
  unsigned v_lane;
  float scale_log2;
};

constexpr int kNoTile = -1;

// Takes keys [key0, key0 + kKeys), whose copy is under way. On the diagonal of a tile, that tile
// sees a part of them, those before it none and those after it all.
template <int kDim, int kOnDiagonal>
__device__ __forceinline__ void Step(const HeadTiles& head, int key0, WarpQueries<kDim>& queries) {
  constexpr int kFirst = kOnDiagonal == kNoTile ? 0 : kOnDiagonal;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  WaitForCopies();
  __syncthreads();  // the keys are there, and the values of the step before are done with
  LoadTile<kDim, kKeys>(head.v_tile, head.v, head.kv_stride, key0, head.window);
  CommitCopies();

  float score[kTiles][kKeys / 8][4] = {};
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned a[kTiles][4];
#pragma unroll
    for (int t = kFirst; t < kTiles; ++t) {
      LoadMatrix4(a[t], head.q_lane + TileBytes<kDim>(t * kKeys, d));
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      unsigned b[4];
      LoadMatrix4(b, head.k_lane + TileBytes<kDim>(n, d));
#pragma unroll
      for (int t = kFirst; t < kTiles; ++t) {
        Mma(score[t][n / 8], a[t], b[0], b[1]);
        Mma(score[t][n / 8 + 1], a[t], b[2], b[3]);
      }
    }
  }
  WaitForCopies();
  __syncthreads();  // the values are there, and the keys are done with
  if (key0 + kKeys < head.keys_end) {
    LoadTile<kDim, kKeys>(head.k_tile, head.k, head.kv_stride, key0 + kKeys, head.window);
    CommitCopies();
  }

  unsigned weights[kTiles][kKeys / 16][4];  // operand fragments of P V
#pragma unroll
  for (int t = kFirst; t < kTiles; ++t) {
    float(&row_max)[2] = queries.row_max[t];
    float(&row_sum)[2] = queries.row_sum[t];
    float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (t == kOnDiagonal) {
          const int key = n * 8 + lane % 4 * 2 + e % 2;
          if (key > head.warp_row + lane / 4 + e / 2 * 8) score[t][n][e] = -INFINITY;
        }
        new_max[e / 2] = fmaxf(new_max[e / 2], score[t][n][e]);
      }
    }
    float correction[2];
    float offset[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 1));
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 2));
      correction[h] = Exp2((row_max[h] - new_max[h]) * head.scale_log2);
      offset[h] = new_max[h] * head.scale_log2;
      row_max[h] = new_max[h];
      row_sum[h] *= correction[h];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      float weight[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[e] = Exp2(fmaf(score[t][n][e], head.scale_log2, -offset[e / 2]));
        row_sum[e / 2] += weight[e];
      }
      weights[t][n / 2][n % 2 * 2] = PackBf16(weight[0], weight[1]);
      weights[t][n / 2][n % 2 * 2 + 1] = PackBf16(weight[2], weight[3]);
    }
    // Maxima move seldom once the largest keys have passed.
    if (__any_sync(~0u, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) queries.out[t][d][e] *= correction[e / 2];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys; n += 16) {
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      unsigned b[4];
      LoadMatrix4Transposed(b, head.v_lane + TileBytes<kDim>(n, d));
#pragma unroll
      for (int t = kFirst; t < kTiles; ++t) {
        Mma(queries.out[t][d / 8], weights[t][n / 16], b[0], b[1]);
        Mma(queries.out[t][d / 8 + 1], weights[t][n / 16], b[2], b[3]);
      }
    }
  }
}

// Two CTAs a multiprocessor where registers hold 128 columns of the result, else three.
template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, kDim == 128 ? 2 : 3)
    AttentionKernel(const WindowAttentionParams<bf16> p, int queries_per_key, float scale_log2) {
  constexpr int kStride = kDim + kTilePad;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int window = static_cast<int>(p.window);
  const int head_index =
      static_cast<int>(blockIdx.y * kHeadsTogether + blockIdx.x % kHeadsTogether);
  if (head_index >= p.n_heads) return;  // the last heads may be fewer
  const int block = static_cast<int>((gridDim.x - 1 - blockIdx.x) / kHeadsTogether);
  const int query0 = block * kQueries;
  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * window;
  // A shuffle's result is known to be the same in all lanes, and what follows is computed once.
  const int kv_head = __shfl_sync(~0u, head_index / queries_per_key, 0);
  const int q_stride = static_cast<int>(p.n_heads) * kDim;
  const int kv_stride = static_cast<int>(p.n_kv_heads) * kDim;

  bf16* q_tile = reinterpret_cast<bf16*>(shared);
  const unsigned q_address = SharedAddress(q_tile);
  HeadTiles head;
  head.k = p.k + row0 * kv_stride + kv_head * kDim;
  head.v = p.v + row0 * kv_stride + kv_head * kDim;
  head.kv_stride = kv_stride;
  head.window = window;
  head.keys_end = min(query0 + kQueries, window);
  head.warp_row = warp * kTileRows;
  head.k_tile = q_address + TileBytes<kDim>(kQueries, 0);
  head.v_tile = head.k_tile + TileBytes<kDim>(kKeys, 0);
  head.q_lane = q_address + TileBytes<kDim>(head.warp_row + lane % 16, lane / 16 * 8);
  head.k_lane = head.k_tile + TileBytes<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  head.v_lane = head.v_tile + TileBytes<kDim>(lane % 16, lane / 16 * 8);
  head.scale_log2 = scale_log2;
  LoadTile<kDim, kQueries>(q_address, p.q + row0 * q_stride + head_index * kDim, q_stride, query0,
                           window);
  LoadTile<kDim, kKeys>(head.k_tile, head.k, kv_stride, 0, window);
  CommitCopies();

  WarpQueries<kDim> queries;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) queries.out[t][d][e] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      queries.row_max[t][h] = -INFINITY;
      queries.row_sum[t][h] = 0.0f;
    }
  }
  int key0 = 0;
#pragma unroll 1
  for (; key0 < query0; key0 += kKeys) Step<kDim, kNoTile>(head, key0, queries);
  Step<kDim, 0>(head, key0, queries);
  if (key0 + kKeys < window) Step<kDim, 1>(head, key0 + kKeys, queries);

  // Through the warp's own rows of q_tile, so that a row is written 16 bytes at a time.
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = queries.row_sum[t][h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = 1.0f / sum;
      bf16* row = q_tile + (head.warp_row + t * kKeys + lane / 4 + h * 8) * kStride;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<unsigned*>(row + d * 8 + lane % 4 * 2) =
            PackBf16(queries.out[t][d][h * 2] * inverse, queries.out[t][d][h * 2 + 1] * inverse);
      }
    }
  }
  __syncwarp();
  bf16* y = p.y + (row0 + query0) * q_stride + head_index * kDim;
  constexpr int kPieces = kDim / 8;
#pragma unroll
  for (int i = lane; i < kTiles * kTileRows * kPieces; i += kWarpSize) {
    const int tile_row = i / kPieces;
    const int row = head.warp_row + tile_row / kTileRows * kKeys + tile_row % kTileRows;
    const int column = i % kPieces * 8;
    if (query0 + row < window) {
      *reinterpret_cast<uint4*>(y + row * q_stride + column) =
          *reinterpret_cast<const uint4*>(q_tile + row * kStride + column);
    }
  }
}

// The compiler reads the last scores of a row as a vector of up to this many.
constexpr int kScoresAtOnce = 4;
constexpr int kFp32Threads = 128;
constexpr int kFp32Warps = kFp32Threads / kWarpSize;
// Scores of a query that fit beside BlockReduce's scratch in what every device has without asking.
constexpr int64_t kFp32WindowMax =
    (48 * 1024 / static_cast<int64_t>(sizeof(float)) - kFp32Warps) / kScoresAtOnce * kScoresAtOnce;

// fp32 form: a CTA per query and head, two passes over the keys. For the few tokens of the gate.
__global__ void __launch_bounds__(kFp32Threads)
    AttentionFp32Kernel(const WindowAttentionParams<float> p, float scale) {
  extern __shared__ __align__(16) float scores[];  // [window] of this query, and room for a vector
  __shared__ float scratch[kFp32Warps];
  const int query = static_cast<int>(blockIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t kv_head = head / (p.n_heads / p.n_kv_heads);
  const int64_t q_stride = p.n_heads * p.head_dim;
  const int64_t kv_stride = p.n_kv_heads * p.head_dim;
  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * p.window;
  const float* q = p.q + (row0 + query) * q_stride + head * p.head_dim;
  const float* k = p.k + row0 * kv_stride + kv_head * p.head_dim;
  const float* v = p.v + row0 * kv_stride + kv_head * p.head_dim;
  float largest = -INFINITY;
  for (int key = threadIdx.x; key <= query; key += kFp32Threads) {
    float sum = 0.0f;
    for (int64_t d = 0; d < p.head_dim; ++d) sum = fmaf(q[d], k[key * kv_stride + d], sum);
    scores[key] = sum * scale;
    largest = fmaxf(largest, scores[key]);
  }
  largest = BlockReduce<Max>(largest, scratch);
  float total = 0.0f;
  for (int key = threadIdx.x; key <= query; key += kFp32Threads) {
    scores[key] = expf(scores[key] - largest);
    total += scores[key];
  }
  total = BlockReduce<Sum>(total, scratch);
  for (int64_t d = threadIdx.x; d < p.head_dim; d += kFp32Threads) {
    float sum = 0.0f;
#pragma unroll kScoresAtOnce
    for (int key = 0; key <= query; ++key) sum = fmaf(scores[key], v[key * kv_stride + d], sum);
    p.y[(row0 + query) * q_stride + head * p.head_dim + d] = sum / total;
  }
}

template <typename T>
absl::Status Validate(const WindowAttentionParams<T>& p) {
  if (p.n_kv_heads <= 0 || p.n_heads % p.n_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("n_heads: ", p.n_heads, " is not a multiple of n_kv_heads ", p.n_kv_heads));
  }
  return absl::OkStatus();
}

template <int kDim>
absl::Status Launch(Context& context, const WindowAttentionParams<bf16>& p) {
  constexpr int kShared =
      (kQueries + 2 * kKeys) * (kDim + kTilePad) * static_cast<int>(sizeof(bf16));
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      AttentionKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int64_t n_blocks = (p.window + kQueries - 1) / kQueries;
  const dim3 grid(static_cast<unsigned>(n_blocks * kHeadsTogether),
                  static_cast<unsigned>((p.n_heads + kHeadsTogether - 1) / kHeadsTogether),
                  static_cast<unsigned>(p.n_windows));
  AttentionKernel<kDim><<<grid, kAttentionThreads, kShared, context.stream()>>>(
      p, static_cast<int>(p.n_heads / p.n_kv_heads), kLog2E / sqrtf(static_cast<float>(kDim)));
  return LaunchStatus("WindowAttention", context.stream());
}

}  // namespace

absl::Status WindowAttention(Context& context, const WindowAttentionParams<bf16>& p) {
  if (absl::Status status = Validate(p); !status.ok()) return status;
  if (p.n_windows == 0 || p.window == 0 || p.n_heads == 0) return absl::OkStatus();
  switch (p.head_dim) {
    case 16:
      return Launch<16>(context, p);
    case 32:
      return Launch<32>(context, p);
    case 64:
      return Launch<64>(context, p);
    case 128:
      return Launch<128>(context, p);
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("head_dim: ", p.head_dim, ", the CUDA backend takes 16, 32, 64 or 128"));
  }
}

absl::Status WindowAttention(Context& context, const WindowAttentionParams<float>& p) {
  if (absl::Status status = Validate(p); !status.ok()) return status;
  if (p.n_windows == 0 || p.window == 0 || p.n_heads == 0) return absl::OkStatus();
  if (p.window > kFp32WindowMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "window: ", p.window, ", the fp32 form takes at most ", kFp32WindowMax, " tokens"));
  }
  const auto shared =
      static_cast<size_t>((p.window + kScoresAtOnce - 1) / kScoresAtOnce * kScoresAtOnce) *
      sizeof(float);
  const dim3 grid(static_cast<unsigned>(p.window), static_cast<unsigned>(p.n_heads),
                  static_cast<unsigned>(p.n_windows));
  AttentionFp32Kernel<<<grid, kFp32Threads, shared, context.stream()>>>(
      p, 1.0f / sqrtf(static_cast<float>(p.head_dim)));
  return LaunchStatus("WindowAttention (fp32)", context.stream());
}

}  // namespace walsh::kernels::cuda
