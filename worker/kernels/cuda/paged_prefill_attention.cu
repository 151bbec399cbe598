// PagedPrefillAttention (worker/kernels/cuda/paged_attention.h): FlashAttention-2's loop, as
// window_attention.cu has it, against the pool.
//
// The rows of a CTA's products are pairs of a batch row and a query head of one kv head, the heads
// of a row next to one another: keys and values are read once for all of them, and few rows still
// fill the tiles. Keys come 64 at a time from multiples of 64 of the sequence on. What a row does
// not see of them changes none of its bits: its maximum stays, the correction is 1, the weights are
// 0.
#include <cmath>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/paged_kv.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 16;  // of an mma's accumulator
constexpr int kKeys = 64;      // of a step
constexpr int kBlocksOfStep = kKeys / kPoolBlockTokens;
static_assert(kBlocksOfStep == kTableAlignment, "a step's blocks are one load from the table");
constexpr int64_t kCtasMax = (int64_t{1} << 31) - 1;

template <int kDim>
struct PrefillForm {
  static constexpr int kTiles = kDim > 128 ? 1 : 2;     // of a warp, as registers allow
  static constexpr int kWarpRows = kTiles * kTileRows;  // follow one another
  static constexpr int kRows = kWarps * kWarpRows;      // of a CTA
  static constexpr int kPieces = kDim / 8;              // of 16 bytes, of a row
  static constexpr int kShared =
      (kRows + 2 * kKeys) * (kDim + kTilePad) * static_cast<int>(sizeof(bf16));
  static constexpr int kCtas = kDim <= 64 ? 3 : 2;
};

// What a CTA works on: rows [first, first + kRows) of the sequence's pairs of row and head.
struct Work {
  int sequence;
  int kv_head;
  int first;
  int n_pairs;  // of the sequence
  int n_past;
  int keys_seen;  // the first key that any of the rows sees
  int keys_end;   // behind the last
};

template <int kDim>
__device__ __forceinline__ bool FindWork(const PagedAttentionArguments& p, Work* work) {
  constexpr int kRows = PrefillForm<kDim>::kRows;
  const auto n_tiles = [&](int s) {
    return (p.batch.n_sequence_rows[s] * p.queries_per_key + kRows - 1) / kRows;
  };
  const int tile = static_cast<int>(blockIdx.x) / p.n_kv_heads;
  work->kv_head = static_cast<int>(blockIdx.x) - tile * p.n_kv_heads;
  SequenceSearch search;
  int of_sequence = 0;
  if (!search.Find(tile, static_cast<int>(p.batch.n_sequences), n_tiles, &work->sequence,
                   &of_sequence)) {
    return false;
  }
  // The last rows of a sequence first: they see the most.
  work->first = (n_tiles(work->sequence) - 1 - of_sequence) * kRows;
  work->n_pairs = p.batch.n_sequence_rows[work->sequence] * p.queries_per_key;
  work->n_past = p.batch.n_past[work->sequence];
  const int last = min(work->first + kRows, work->n_pairs) - 1;
  work->keys_seen = p.FirstSeen(work->n_past + work->first / p.queries_per_key);
  work->keys_end = work->n_past + last / p.queries_per_key + 1;
  return true;
}

// Starts the copy of the keys (or values) of a step, zeros where no row sees them. `pool` is where
// those of the kv head in block 0 begin.
template <int kDim>
__device__ __forceinline__ void CopyKeys(unsigned tile, const bf16* pool, int64_t block_stride,
                                         const int4& blocks, int key0, const Work& work) {
  constexpr int kPieces = PrefillForm<kDim>::kPieces;
  constexpr int kPiecesOfBlock = kPoolBlockTokens * kPieces;
#pragma unroll
  for (int i = 0; i < kKeys * kPieces / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = piece / kPieces;
    const int b =
        kPiecesOfBlock % kThreads == 0 ? i * kThreads / kPiecesOfBlock : piece / kPiecesOfBlock;
    const int block = b < 2 ? (b == 0 ? blocks.x : blocks.y) : (b == 2 ? blocks.z : blocks.w);
    const int key = key0 + row;
    const bool is_seen = key >= work.keys_seen && key < work.keys_end;
    const bf16* from = pool + block * block_stride + (piece - b * kPiecesOfBlock) * 8;
    CopyAsync16(tile + TileBytes<kDim>(row, piece % kPieces * 8), is_seen ? from : pool, is_seen);
  }
}

// Where pair `pair` lies in q or y.
__device__ __forceinline__ int64_t PairOffset(const PagedAttentionArguments& p, const Work& work,
                                              int64_t first_row, int64_t stride, int pair,
                                              int head_dim) {
  const int row = pair / p.queries_per_key;
  const int head = work.kv_head * p.queries_per_key + pair - row * p.queries_per_key;
  return (first_row + row) * stride + head * head_dim;
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, PrefillForm<kDim>::kCtas)
    PrefillKernel(const PagedAttentionArguments p) {
  using Form = PrefillForm<kDim>;
  constexpr int kTiles = Form::kTiles;
  constexpr int kStride = kDim + kTilePad;
  extern __shared__ __align__(16) unsigned char shared[];
  WaitForPreviousKernel();
  LetNextKernelStart();
  Work work;
  if (!FindWork<kDim>(p, &work)) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // A shuffle's result is known to be the same in all lanes, and what follows is computed once.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int64_t first_row = p.batch.first_row[work.sequence];
  const bf16* keys = p.pool + work.kv_head * (kPoolBlockTokens * kDim);
  const bf16* values = keys + p.block_stride / 2;
  const auto* table =
      reinterpret_cast<const int4*>(p.batch.tables + work.sequence * p.batch.max_blocks);

  bf16* q_tile = reinterpret_cast<bf16*>(shared);
  const unsigned q_address = SharedAddress(q_tile);
  const unsigned k_tile = q_address + TileBytes<kDim>(Form::kRows, 0);
  const unsigned v_tile = k_tile + TileBytes<kDim>(kKeys, 0);
  const int warp_row = warp * Form::kWarpRows;
  const unsigned q_lane = q_address + TileBytes<kDim>(warp_row + lane % 16, lane / 16 * 8);
  const unsigned k_lane = k_tile + TileBytes<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const unsigned v_lane = v_tile + TileBytes<kDim>(lane % 16, lane / 16 * 8);

  int key0 = work.keys_seen / kKeys * kKeys;
#pragma unroll
  for (int i = 0; i < Form::kRows * Form::kPieces / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = piece / Form::kPieces;
    const int column = piece % Form::kPieces * 8;
    const bool is_there = work.first + row < work.n_pairs;
    const int64_t offset =
        is_there ? PairOffset(p, work, first_row, p.q_stride, work.first + row, kDim) + column : 0;
    CopyAsync16(q_address + TileBytes<kDim>(row, column), p.q + offset, is_there);
  }
  CopyKeys<kDim>(k_tile, keys, p.block_stride, table[key0 / kKeys], key0, work);
  CommitCopies();

  // Of the warp's first row and its last.
  const int first_position = work.n_past + (work.first + warp_row) / p.queries_per_key;
  const int last_position =
      work.n_past + (work.first + warp_row + Form::kWarpRows - 1) / p.queries_per_key;

  float out[kTiles][kDim / 8][4] = {};  // Σ of weight · v, not normalized
  float row_max[kTiles][2];             // of scores before scaling
  float row_sum[kTiles][2] = {};        // of this lane's columns
#pragma unroll
  for (int t = 0; t < kTiles; ++t) row_max[t][0] = row_max[t][1] = -INFINITY;

#pragma unroll 1
  for (; key0 < work.keys_end; key0 += kKeys) {
    const bool is_last = key0 + kKeys >= work.keys_end;
    // Loaded again rather than kept in registers: the first-level cache has them from the last
    // step.
    const int4 blocks = table[key0 / kKeys];
    const int4 next_blocks = table[key0 / kKeys + (is_last ? 0 : 1)];
    const bool sees_any = key0 <= last_position && key0 + kKeys > p.FirstSeen(first_position);
    const bool sees_all = key0 + kKeys - 1 <= first_position && key0 >= p.FirstSeen(last_position);
    WaitForCopies();
    __syncthreads();  // the keys are there, and the values of the step before are done with
    CopyKeys<kDim>(v_tile, values, p.block_stride, blocks, key0, work);
    CommitCopies();

    float score[kTiles][kKeys / 8][4] = {};
    if (sees_any) {
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        unsigned a[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          LoadMatrix4(a[t], q_lane + TileBytes<kDim>(t * kTileRows, d));
        }
#pragma unroll
        for (int n = 0; n < kKeys; n += 16) {
          unsigned b[4];
          LoadMatrix4(b, k_lane + TileBytes<kDim>(n, d));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            Mma(score[t][n / 8], a[t], b[0], b[1]);
            Mma(score[t][n / 8 + 1], a[t], b[2], b[3]);
          }
        }
      }
    }
    WaitForCopies();
    __syncthreads();  // the values are there, and the keys are done with
    if (!is_last) {
      CopyKeys<kDim>(k_tile, keys, p.block_stride, next_blocks, key0 + kKeys, work);
      CommitCopies();
    }
    if (!sees_any) continue;

    if (!sees_all) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int pair = work.first + warp_row + t * kTileRows + lane / 4;
        const int position[2] = {work.n_past + pair / p.queries_per_key,
                                 work.n_past + (pair + 8) / p.queries_per_key};
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = key0 + n * 8 + lane % 4 * 2 + e % 2;
            if (key > position[e / 2] || key < p.FirstSeen(position[e / 2])) {
              score[t][n][e] = -INFINITY;
            }
          }
        }
      }
    }
    unsigned weights[kTiles][kKeys / 16][4];  // operand fragments of the product with the values
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float new_max[2] = {row_max[t][0], row_max[t][1]};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) new_max[e / 2] = fmaxf(new_max[e / 2], score[t][n][e]);
      }
      float correction[2];
      float offset[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 1));
        new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 2));
        // A row that has seen nothing yet stays as it is.
        const bool is_empty = new_max[h] == -INFINITY;
        correction[h] = is_empty ? 1.0f : Exp2((row_max[t][h] - new_max[h]) * p.scale_log2);
        offset[h] = is_empty ? 0.0f : new_max[h] * p.scale_log2;
        row_max[t][h] = new_max[h];
        row_sum[t][h] *= correction[h];
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          weight[e] = Exp2(fmaf(score[t][n][e], p.scale_log2, -offset[e / 2]));
          row_sum[t][e / 2] += weight[e];
        }
        weights[t][n / 2][n % 2 * 2] = PackBf16(weight[0], weight[1]);
        weights[t][n / 2][n % 2 * 2 + 1] = PackBf16(weight[2], weight[3]);
      }
      // Maxima move seldom once the largest keys have passed.
      if (__any_sync(~0u, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[t][d][e] *= correction[e / 2];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        unsigned b[4];
        LoadMatrix4Transposed(b, v_lane + TileBytes<kDim>(n, d));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          Mma(out[t][d / 8], weights[t][n / 16], b[0], b[1]);
          Mma(out[t][d / 8 + 1], weights[t][n / 16], b[2], b[3]);
        }
      }
    }
  }

  // Through the warp's own rows of q_tile, so that a row is written 16 bytes at a time.
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = row_sum[t][h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = 1.0f / sum;
      bf16* row = q_tile + (warp_row + t * kTileRows + lane / 4 + h * 8) * kStride;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<unsigned*>(row + d * 8 + lane % 4 * 2) =
            PackBf16(out[t][d][h * 2] * inverse, out[t][d][h * 2 + 1] * inverse);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Form::kWarpRows * Form::kPieces / kWarpSize; ++i) {
    const int piece = i * kWarpSize + lane;
    const int row = warp_row + piece / Form::kPieces;
    const int column = piece % Form::kPieces * 8;
    if (work.first + row < work.n_pairs) {
      *reinterpret_cast<uint4*>(
          p.y + PairOffset(p, work, first_row, p.y_stride, work.first + row, kDim) + column) =
          *reinterpret_cast<const uint4*>(q_tile + row * kStride + column);
    }
  }
}

template <int kDim>
absl::Status Launch(const PagedAttentionParams& params, const PagedAttentionArguments& arguments) {
  using Form = PrefillForm<kDim>;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      PrefillKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, Form::kShared));
  // Each sequence's last tile may be short.
  const int64_t n_tiles =
      params.batch.n_rows * arguments.queries_per_key / Form::kRows + params.batch.n_sequences;
  const int64_t n_ctas = n_tiles * arguments.n_kv_heads;
  if (n_ctas > kCtasMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("PagedPrefillAttention: ", params.batch.n_rows, " rows of ",
                     params.batch.n_sequences, " sequences and ", params.n_heads, " heads take ",
                     n_ctas, " CTAs, the limit is ", kCtasMax));
  }
  return LaunchKernel("PagedPrefillAttention", PrefillKernel<kDim>,
                      {.grid = dim3(static_cast<unsigned>(n_ctas)),
                       .threads = kThreads,
                       .shared_bytes = Form::kShared,
                       .overlap_previous = params.overlap_previous,
                       .stream = params.stream},
                      arguments);
}

}  // namespace

absl::Status PagedPrefillAttention(const PagedAttentionParams& params) {
  PagedAttentionArguments arguments{};
  WALSH_RETURN_IF_ERROR(MakeArguments("PagedPrefillAttention", params, &arguments));
  if (params.batch.n_sequences == 0) return absl::OkStatus();
  return ForHeadDim("PagedPrefillAttention", params.pool.shape.head_dim,
                    [&]<int kDim>() { return Launch<kDim>(params, arguments); });
}

}  // namespace walsh::kernels::cuda
