// PagedPrefillAttention (worker/kernels/cuda/paged_attention.h): FlashAttention-2's loop, as
// window_attention.cu has it, against the pool.
//
// The rows of a CTA's products are pairs of a batch row and a query head of one kv head, the heads
// of a row next to one another: keys and values are read once for all of them, and few rows still
// fill the tiles. Keys come 64 at a time from multiples of 64 of the sequence on. What a row does
// not see of them changes none of its bits: its maximum stays, the correction is 1, the weights are
// 0.
//
// Of a quantized pool the codes of a step are copied to a place of their own, and become a tile in
// bf16 when they are there: two more barriers of the CTA, and one rounding.
#include <cmath>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/kv_codes.cuh"
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

// kBits: of the pool.
template <int kDimOfHead, int kBitsOfPool>
struct PrefillForm {
  static constexpr int kDim = kDimOfHead;
  static constexpr int kBits = kBitsOfPool;
  static constexpr bool kIsQuantized = kBits != KvForm::kBf16;
  static constexpr int kTiles = kDim > 128 ? 1 : 2;     // of a warp, as registers allow
  static constexpr int kWarpRows = kTiles * kTileRows;  // follow one another
  static constexpr int kRows = kWarps * kWarpRows;      // of a CTA
  static constexpr int kPieces = kDim / 8;              // of 16 bytes, of a row
  static constexpr int kCodesAt =                       // behind the tiles
      (kRows + 2 * kKeys) * (kDim + kTilePad) * static_cast<int>(sizeof(bf16));
  // Of a step, and what a token has in the pool: codes, and grids of 32 values or more.
  static constexpr int kTokenBytes = kIsQuantized ? kDim * kBits / 8 : 0;
  static constexpr int kGridsMax = kIsQuantized ? kDim / 32 : 0;
  static constexpr int kGridsAt = kCodesAt + kKeys * kTokenBytes;
  static constexpr int kShared = kGridsAt + kKeys * kGridsMax * static_cast<int>(sizeof(uint32_t));
  // As shared memory and registers allow.
  static constexpr int kCtas = kDim <= 64 ? 3 : kDim <= 128 || !kIsQuantized ? 2 : 1;
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

template <int kRows>
__device__ __forceinline__ bool FindWork(const PagedAttentionArguments& p, Work* work) {
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
__device__ __forceinline__ void CopyKeys(unsigned tile, const unsigned char* pool,
                                         int64_t block_bytes, const int4& blocks, int key0,
                                         const Work& work) {
  constexpr int kPieces = kDim / 8;
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
    const unsigned char* from = pool + block * block_bytes + (piece - b * kPiecesOfBlock) * 16;
    CopyAsync16(tile + TileBytes<kDim>(row, piece % kPieces * 8), is_seen ? from : pool, is_seen);
  }
}

// The same for codes and their grids, which go to where the form has them behind `shared`.
template <typename Form>
__device__ __forceinline__ void CopyCodes(unsigned shared, const unsigned char* pool,
                                          int64_t block_bytes, int n_groups, const int4& blocks,
                                          int key0, const Work& work) {
  constexpr int kPieces = Form::kTokenBytes / 16;
  const auto copy = [&](int row, int byte_of_block, auto copy_piece) {
    const int b = row / kPoolBlockTokens;
    const int block = b < 2 ? (b == 0 ? blocks.x : blocks.y) : (b == 2 ? blocks.z : blocks.w);
    const int key = key0 + row;
    const bool is_seen = key >= work.keys_seen && key < work.keys_end;
    copy_piece(is_seen ? pool + block * block_bytes + byte_of_block : pool, is_seen);
  };
#pragma unroll
  for (int i = 0; i < (kKeys * kPieces + kThreads - 1) / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = piece / kPieces;
    if (row >= kKeys) continue;
    const int of_block = piece - row / kPoolBlockTokens * kPoolBlockTokens * kPieces;
    copy(row, of_block * 16, [&](const unsigned char* from, bool is_seen) {
      CopyAsync16(shared + Form::kCodesAt + piece * 16, from, is_seen);
    });
  }
  for (int i = static_cast<int>(threadIdx.x); i < kKeys * n_groups; i += kThreads) {
    const int row = i / n_groups;
    const int of_block = i - row / kPoolBlockTokens * kPoolBlockTokens * n_groups;
    copy(row, kPoolBlockTokens * Form::kTokenBytes + of_block * 4,
         [&](const unsigned char* from, bool is_seen) {
           CopyAsync4(shared + Form::kGridsAt + i * 4, from, is_seen);
         });
  }
}

// Makes a tile of what CopyCodes has brought.
template <typename Form>
__device__ __forceinline__ void DequantizeTile(const unsigned char* shared, unsigned char* tile,
                                               int n_groups, int group_size_log2) {
  constexpr int kPieces = Form::kPieces;  // of 8 elements
  const auto* grids = reinterpret_cast<const uint32_t*>(shared + Form::kGridsAt);
#pragma unroll
  for (int i = 0; i < kKeys * kPieces / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = piece / kPieces;
    const int column = piece % kPieces * 8;
    const int group = n_groups == 1 ? 0 : column >> group_size_log2;
    *reinterpret_cast<uint4*>(tile + TileBytes<Form::kDim>(row, column)) =
        DequantizeCodes<Form::kBits>(shared + Form::kCodesAt + piece * Form::kBits,
                                     grids[row * n_groups + group]);
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

template <typename Form>
__global__ void __launch_bounds__(kThreads, Form::kCtas)
    PrefillKernel(const PagedAttentionArguments p) {
  constexpr int kDim = Form::kDim;
  constexpr int kTiles = Form::kTiles;
  constexpr int kStride = kDim + kTilePad;
  extern __shared__ __align__(16) unsigned char shared[];
  WaitForPreviousKernel();
  LetNextKernelStart();
  Work work;
  if (!FindWork<Form::kRows>(p, &work)) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // A shuffle's result is known to be the same in all lanes, and what follows is computed once.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int64_t first_row = p.batch.first_row[work.sequence];
  const unsigned char* keys = p.pool + work.kv_head * p.head_bytes;
  const unsigned char* values = keys + p.block_bytes / 2;
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
  // Keys or values of a step come to the tile, or their codes to where they become it.
  const auto copy = [&](unsigned tile, const unsigned char* pool, const int4& blocks, int first) {
    if constexpr (Form::kIsQuantized) {
      CopyCodes<Form>(q_address, pool, p.block_bytes, p.n_groups, blocks, first, work);
    } else {
      CopyKeys<kDim>(tile, pool, p.block_bytes, blocks, first, work);
    }
    CommitCopies();
  };
  // By all threads, once they have what was copied last.
  const auto dequantize = [&](unsigned tile) {
    if constexpr (Form::kIsQuantized) {
      DequantizeTile<Form>(shared, shared + (tile - q_address), p.n_groups, p.group_size_log2);
      __syncthreads();  // the tile is there, and the codes are done with
    }
  };
  copy(k_tile, keys, table[key0 / kKeys], key0);

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
    dequantize(k_tile);
    copy(v_tile, values, blocks, key0);

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
    dequantize(v_tile);
    if (!is_last) copy(k_tile, keys, next_blocks, key0 + kKeys);
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

template <typename Form>
absl::Status Launch(const PagedAttentionParams& params, const PagedAttentionArguments& arguments) {
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      PrefillKernel<Form>, cudaFuncAttributeMaxDynamicSharedMemorySize, Form::kShared));
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
  return LaunchKernel("PagedPrefillAttention", PrefillKernel<Form>,
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
  const KvPoolShape& pool = params.pool.shape;
  const auto launch = [&]<int kBits>() {
    return ForQuantizedHeadDim(pool.head_dim, [&]<int kDim>() {
      return Launch<PrefillForm<kDim, kBits>>(params, arguments);
    });
  };
  switch (pool.form.bits) {
    case 8:
      return launch.template operator()<8>();
    case 4:
      return launch.template operator()<4>();
    default:
      return ForHeadDim("PagedPrefillAttention", pool.head_dim, [&]<int kDim>() {
        return Launch<PrefillForm<kDim, KvForm::kBf16>>(params, arguments);
      });
  }
}

}  // namespace walsh::kernels::cuda
