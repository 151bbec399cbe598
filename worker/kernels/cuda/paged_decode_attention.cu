// PagedDecodeAttention (worker/kernels/cuda/paged_attention.h).
//
// A warp has 32 tokens of a piece of 128 and copies their keys and values to shared memory by
// itself, all of them at once: with three CTAs on a multiprocessor some 100 KiB are under way
// there. The query heads of a kv head are the rows of mma.m16n8k16, unused ones zero: the tensor
// cores are far from busy, and one form serves groups from 1 to 16. Where a group has more heads,
// it is taken in parts. CTAs go on to other pieces until there are no more, and the next one's
// copies are under way while one is being multiplied.
#include <algorithm>
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
constexpr int kWarpTokens = 32;
constexpr int kPieceTokens = static_cast<int>(kDecodePieceTokens);
static_assert(kPieceTokens == kWarps * kWarpTokens, "a CTA takes a piece at once");
constexpr int kHeadRows = 16;  // query heads at once, of mma's rows
constexpr int kBlocksOfWarp = kWarpTokens / kPoolBlockTokens;
constexpr int64_t kItemsMax = int64_t{1} << 30;  // of a launch: they are counted in int32

// How the query heads of a kv head are cut.
struct HeadParts {
  int n_parts;
  int n_heads;  // of a part; the last may have fewer
};
HeadParts PartsOf(int64_t queries_per_key) {
  const int64_t n_parts = (queries_per_key + kHeadRows - 1) / kHeadRows;
  return {static_cast<int>(n_parts), static_cast<int>((queries_per_key + n_parts - 1) / n_parts)};
}

struct DecodeArguments {
  PagedAttentionArguments attention;
  HeadParts parts;
  int64_t n_items_max;
  float* sums;        // [item, parts.n_heads, head_dim], not normalized
  float2* softmax;    // [item, parts.n_heads]: maximum (of log2) and sum of weights
  int32_t* counters;  // [sequence, kv head, part]: pieces that are done
};

template <int kDim>
struct DecodeForm {
  static constexpr int kPieces = kDim / 8;  // of 16 bytes, of a token
  static constexpr unsigned kTileBytes =    // of a warp's keys or values
      static_cast<unsigned>(kWarpTokens * (kDim + kTilePad)) * sizeof(bf16);
  // A warp's sums lie where its values were, kHeadRows rows of fp32.
  static constexpr int kSumStride = kDim + kTilePad;
  static_assert(kHeadRows * kSumStride * sizeof(float) == kTileBytes);
  static constexpr int kShared = static_cast<int>(2 * kWarps * kTileBytes);
  static constexpr int kCtas = kDim <= 64 ? 5 : kDim <= 128 ? 3 : 1;
  static constexpr int kVectors = kDim / 4;
  static constexpr int kMergers = kThreads / kVectors;  // threads that share a merged element
};

// A piece of a sequence for query heads of one kv head.
struct Item {
  int index;  // among all; those of the pieces of a sequence, kv head and part follow one another
  int sequence;
  int kv_head;
  int part;
  int piece;  // among those that the sequence's row sees
  int n_pieces;
  int first;  // token of the piece
  int end;    // of the sequence's tokens
  int seen;   // the first token that is seen
};

// The next item of this CTA from `index` on that has its place in the workspace.
__device__ __forceinline__ bool NextItem(const DecodeArguments& p, int index,
                                         SequenceSearch& search, Item* item) {
  const PagedAttentionArguments& a = p.attention;
  const int n_units = a.n_kv_heads * p.parts.n_parts;
  const auto n_pieces = [&](int s) {
    if (a.batch.n_sequence_rows[s] == 0) return 0;
    return static_cast<int>(DecodePieces(a.batch.n_past[s], a.window));
  };
  for (;; index += static_cast<int>(gridDim.x)) {
    int of_sequence = 0;
    const bool is_found = search.Find(
        index, static_cast<int>(a.batch.n_sequences), [&](int s) { return n_units * n_pieces(s); },
        &item->sequence, &of_sequence);
    if (!is_found) return false;
    item->index = index;
    item->n_pieces = n_pieces(item->sequence);
    const int unit = of_sequence / item->n_pieces;
    item->piece = of_sequence - unit * item->n_pieces;
    if (index - item->piece + item->n_pieces > p.n_items_max) continue;
    item->kv_head = unit / p.parts.n_parts;
    item->part = unit - item->kv_head * p.parts.n_parts;
    const int position = a.batch.n_past[item->sequence];
    item->end = position + 1;
    item->seen = a.FirstSeen(position);
    item->first = (item->seen / kPieceTokens + item->piece) * kPieceTokens;
    return true;
  }
}

// Where this warp's tokens lie.
struct WarpTokens {
  int first;
  bool is_idle;                     // none of them is seen
  const bf16* keys[kBlocksOfWarp];  // of a block, only where one is seen
};

__device__ __forceinline__ WarpTokens FindTokens(const PagedAttentionArguments& p, const Item& item,
                                                 int head_stride) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  WarpTokens tokens;
  tokens.first = item.first + warp * kWarpTokens;
  tokens.is_idle = tokens.first >= item.end || tokens.first + kWarpTokens <= item.seen;
  const int32_t* table = p.batch.tables + item.sequence * p.batch.max_blocks;
#pragma unroll
  for (int b = 0; b < kBlocksOfWarp; ++b) {
    const int first = tokens.first + b * kPoolBlockTokens;
    const bool is_seen = first < item.end && first + kPoolBlockTokens > item.seen;
    const int64_t block = is_seen ? table[first / kPoolBlockTokens] : 0;
    tokens.keys[b] = p.pool + block * p.block_stride + item.kv_head * head_stride;
  }
  return tokens;
}

// Starts the copy of the warp's keys, or of its values, which are `offset` further; zeros where a
// token is not seen.
template <int kDim>
__device__ __forceinline__ void CopyTokens(unsigned tile, const WarpTokens& tokens, int64_t offset,
                                           const Item& item) {
  constexpr int kPieces = DecodeForm<kDim>::kPieces;
  constexpr int kCopiesOfBlock = kPoolBlockTokens * kPieces / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (tokens.is_idle) return;
#pragma unroll
  for (int b = 0; b < kBlocksOfWarp; ++b) {
    const bf16* block = tokens.keys[b] + offset;
#pragma unroll
    for (int i = 0; i < kCopiesOfBlock; ++i) {
      const int piece = i * kWarpSize + lane;
      const int row = piece / kPieces;
      const int token = tokens.first + b * kPoolBlockTokens + row;
      CopyAsync16(tile + TileBytes<kDim>(b * kPoolBlockTokens + row, piece % kPieces * 8),
                  block + piece * 8, token >= item.seen && token < item.end);
    }
  }
}

// What the pieces of a unit gave, added up in their order and normalized.
template <int kDim>
__device__ void MergePieces(const DecodeArguments& p, const Item& item, int n_heads, bf16* y,
                            float (&merged)[kHeadRows][2], float* scratch) {
  using Form = DecodeForm<kDim>;
  constexpr int kVectors = Form::kVectors;
  constexpr int kUnrolled = 8;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int n = item.n_pieces;
  const int64_t heads = p.parts.n_heads;
  const int64_t first = static_cast<int64_t>(item.index - item.piece) * heads;
  for (int h = thread / kWarpSize; h < n_heads; h += kWarps) {
    float highest = -INFINITY;
    for (int i = lane; i < n; i += kWarpSize) {
      highest = fmaxf(highest, __ldcg(p.softmax + first + i * heads + h).x);
    }
    highest = WarpReduce<Max>(highest);
    float sum = 0.0f;
    for (int i = lane; i < n; i += kWarpSize) {
      const float2 of_piece = __ldcg(p.softmax + first + i * heads + h);
      sum = fmaf(of_piece.y, Exp2(of_piece.x - highest), sum);
    }
    sum = WarpReduce<Sum>(sum);
    if (lane == 0) {
      merged[h][0] = highest;
      merged[h][1] = 1.0f / sum;
    }
  }
  __syncthreads();
  const int merger = thread / kVectors;
  const int vector = thread % kVectors;
  for (int h = 0; h < n_heads; ++h) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (merger < Form::kMergers) {
#pragma unroll kUnrolled
      for (int i = merger; i < n; i += Form::kMergers) {
        const int64_t row = first + i * heads + h;
        const float weight = Exp2(__ldcg(p.softmax + row).x - merged[h][0]);
        const float4 part = __ldcg(reinterpret_cast<const float4*>(p.sums + row * kDim) + vector);
        sum.x = fmaf(part.x, weight, sum.x);
        sum.y = fmaf(part.y, weight, sum.y);
        sum.z = fmaf(part.z, weight, sum.z);
        sum.w = fmaf(part.w, weight, sum.w);
      }
      reinterpret_cast<float4*>(scratch)[thread] = sum;
    }
    __syncthreads();
    if (merger == 0) {
      for (int m = 1; m < Form::kMergers; ++m) {
        const float4 part = reinterpret_cast<const float4*>(scratch)[m * kVectors + vector];
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      const float inverse = merged[h][1];
      *reinterpret_cast<uint2*>(y + h * kDim + vector * 4) = {
          PackBf16(sum.x * inverse, sum.y * inverse), PackBf16(sum.z * inverse, sum.w * inverse)};
    }
    __syncthreads();
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, DecodeForm<kDim>::kCtas)
    DecodeKernel(const DecodeArguments p) {
  using Form = DecodeForm<kDim>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float warp_max[kWarps][kHeadRows];
  __shared__ float warp_sum[kWarps][kHeadRows];
  __shared__ float merged[kHeadRows][2];
  __shared__ __align__(16) float scratch[4 * kThreads];
  __shared__ bool is_last;
  WaitForPreviousKernel();
  LetNextKernelStart();
  const PagedAttentionArguments& a = p.attention;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  constexpr int kHeadStride = kPoolBlockTokens * kDim;
  const int64_t to_values = a.block_stride / 2;
  const unsigned k_tile =
      SharedAddress(shared) + static_cast<unsigned>(warp) * 2 * Form::kTileBytes;
  const unsigned v_tile = k_tile + Form::kTileBytes;
  const unsigned k_lane = k_tile + TileBytes<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const unsigned v_lane = v_tile + TileBytes<kDim>(lane % 16, lane / 16 * 8);
  const auto sums_of = [&](int w) {
    return reinterpret_cast<float*>(shared + static_cast<unsigned>(2 * w + 1) * Form::kTileBytes);
  };

  SequenceSearch search;
  Item item;
  if (!NextItem(p, static_cast<int>(blockIdx.x), search, &item)) return;
  WarpTokens tokens = FindTokens(a, item, kHeadStride);
  CopyTokens<kDim>(k_tile, tokens, 0, item);
  CommitCopies();
  CopyTokens<kDim>(v_tile, tokens, to_values, item);
  CommitCopies();

  for (bool has_next = true; has_next;) {
    const int head = item.kv_head * a.queries_per_key + item.part * p.parts.n_heads;
    const int n_heads = min(p.parts.n_heads, a.queries_per_key - item.part * p.parts.n_heads);
    const int64_t row = a.batch.first_row[item.sequence];
    unsigned query[kDim / 16][4];
    if (!tokens.is_idle) {
      const bf16* q = a.q + row * a.q_stride + head * kDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = lane / 4 + e % 2 * 8;
          query[d][e] = 0;
          if (h < n_heads) {
            query[d][e] = *reinterpret_cast<const unsigned*>(q + h * kDim + d * 16 + e / 2 * 8);
          }
        }
      }
    }
    Item next;
    has_next = NextItem(p, item.index + static_cast<int>(gridDim.x), search, &next);
    WarpTokens next_tokens;
    if (has_next) next_tokens = FindTokens(a, next, kHeadStride);

    WaitForCopies<1>();
    __syncwarp();  // the warp's keys are there
    float score[kWarpTokens / 8][4] = {};
    if (!tokens.is_idle) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int n = 0; n < kWarpTokens; n += 16) {
          unsigned b[4];
          LoadMatrix4(b, k_lane + TileBytes<kDim>(n, d * 16));
          Mma(score[n / 8], query[d], b[0], b[1]);
          Mma(score[n / 8 + 1], query[d], b[2], b[3]);
        }
      }
    }
    __syncwarp();  // and done with
    if (has_next) CopyTokens<kDim>(k_tile, next_tokens, 0, next);
    CommitCopies();

    float highest[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
    unsigned weights[kWarpTokens / 16][4];
    if (!tokens.is_idle) {
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = tokens.first + n * 8 + lane % 4 * 2 + e % 2;
          if (token < item.seen || token >= item.end) score[n][e] = -INFINITY;
          highest[e / 2] = fmaxf(highest[e / 2], score[n][e]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 1));
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 2));
        highest[h] *= a.scale_log2;
      }
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n) {
        float weight[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          weight[e] = Exp2(fmaf(score[n][e], a.scale_log2, -highest[e / 2]));
          sum[e / 2] += weight[e];
        }
        weights[n / 2][n % 2 * 2] = PackBf16(weight[0], weight[1]);
        weights[n / 2][n % 2 * 2 + 1] = PackBf16(weight[2], weight[3]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      }
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        warp_max[warp][lane / 4 + h * 8] = highest[h];
        warp_sum[warp][lane / 4 + h * 8] = sum[h];
      }
    }

    WaitForCopies<1>();
    __syncwarp();  // the warp's values are there
    if (!tokens.is_idle) {
      float out[kDim / 8][4] = {};
#pragma unroll
      for (int n = 0; n < kWarpTokens; n += 16) {
#pragma unroll
        for (int d = 0; d < kDim; d += 16) {
          unsigned b[4];
          LoadMatrix4Transposed(b, v_lane + TileBytes<kDim>(n, d));
          Mma(out[d / 8], weights[n / 16], b[0], b[1]);
          Mma(out[d / 8 + 1], weights[n / 16], b[2], b[3]);
        }
      }
      __syncwarp();  // and done with: the sums take their place
      float* sums = sums_of(warp);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane / 4 + h * 8;
        if (r < n_heads) {
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            *reinterpret_cast<float2*>(sums + r * Form::kSumStride + d * 8 + lane % 4 * 2) = {
                out[d][h * 2], out[d][h * 2 + 1]};
          }
        }
      }
    }
    __syncthreads();

    bf16* y = a.y + row * a.y_stride + head * kDim;
    const int64_t partial = static_cast<int64_t>(item.index) * p.parts.n_heads;
    for (int i = static_cast<int>(threadIdx.x); i < n_heads * Form::kVectors; i += kThreads) {
      const int h = i / Form::kVectors;
      const int column = i % Form::kVectors * 4;
      float largest = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, warp_max[w][h]);
      float total = 0.0f;
      float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (warp_max[w][h] == -INFINITY) continue;  // an idle warp has no sums
        const float weight = Exp2(warp_max[w][h] - largest);
        const float4 part =
            *reinterpret_cast<const float4*>(sums_of(w) + h * Form::kSumStride + column);
        total = fmaf(warp_sum[w][h], weight, total);
        out.x = fmaf(part.x, weight, out.x);
        out.y = fmaf(part.y, weight, out.y);
        out.z = fmaf(part.z, weight, out.z);
        out.w = fmaf(part.w, weight, out.w);
      }
      if (item.n_pieces == 1) {
        const float inverse = 1.0f / total;
        *reinterpret_cast<uint2*>(y + h * kDim + column) = {
            PackBf16(out.x * inverse, out.y * inverse), PackBf16(out.z * inverse, out.w * inverse)};
      } else {
        *reinterpret_cast<float4*>(p.sums + (partial + h) * kDim + column) = out;
        if (column == 0) p.softmax[partial + h] = {largest, total};
      }
    }
    if (item.n_pieces > 1) __threadfence();  // before the piece is counted
    __syncthreads();
    if (has_next) CopyTokens<kDim>(v_tile, next_tokens, to_values, next);
    CommitCopies();

    if (item.n_pieces > 1) {
      int32_t* counter =
          p.counters +
          (static_cast<int64_t>(item.sequence) * a.n_kv_heads + item.kv_head) * p.parts.n_parts +
          item.part;
      if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) == item.n_pieces - 1;
      __syncthreads();
      if (is_last) {
        __threadfence();
        if (threadIdx.x == 0) *counter = 0;  // for the next launch
        MergePieces<kDim>(p, item, n_heads, y, merged, scratch);
      }
    }
    item = next;
    tokens = next_tokens;
  }
}

int64_t ItemsMax(int64_t n_pieces_max, int64_t n_heads, const KvPoolShape& pool) {
  return n_pieces_max * pool.n_kv_heads * PartsOf(n_heads / pool.n_kv_heads).n_parts;
}

template <int kDim>
absl::Status Launch(const PagedAttentionParams& params, const DecodeArguments& arguments) {
  constexpr int kShared = DecodeForm<kDim>::kShared;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      DecodeKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  int device = 0;
  int n_multiprocessors = 0;
  WALSH_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t n_ctas = std::min<int64_t>(arguments.n_items_max,
                                           DecodeForm<kDim>::kCtas * int64_t{n_multiprocessors});
  return LaunchKernel("PagedDecodeAttention", DecodeKernel<kDim>,
                      {.grid = dim3(static_cast<unsigned>(n_ctas)),
                       .threads = kThreads,
                       .shared_bytes = kShared,
                       .overlap_previous = params.overlap_previous,
                       .stream = params.stream},
                      arguments);
}

}  // namespace

int64_t PagedDecodePartials(int64_t n_pieces_max, int64_t n_heads, const KvPoolShape& pool) {
  const int64_t rows =
      ItemsMax(n_pieces_max, n_heads, pool) * PartsOf(n_heads / pool.n_kv_heads).n_heads;
  return rows * (pool.head_dim + 2);
}

int64_t PagedDecodeCounters(int64_t n_sequences, int64_t n_heads, const KvPoolShape& pool) {
  return n_sequences * pool.n_kv_heads * PartsOf(n_heads / pool.n_kv_heads).n_parts;
}

absl::Status PagedDecodeAttention(const PagedAttentionParams& params,
                                  const PagedDecodeWorkspace& workspace) {
  DecodeArguments arguments{};
  WALSH_RETURN_IF_ERROR(MakeArguments("PagedDecodeAttention", params, &arguments.attention));
  if (params.batch.n_sequences == 0) return absl::OkStatus();
  const KvPoolShape& pool = params.pool.shape;
  if (workspace.n_pieces_max < params.batch.n_sequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("PagedDecodeAttention: n_pieces_max ", workspace.n_pieces_max, " for ",
                     params.batch.n_sequences, " sequences, each has one at least"));
  }
  arguments.parts = PartsOf(arguments.attention.queries_per_key);
  arguments.n_items_max = ItemsMax(workspace.n_pieces_max, params.n_heads, pool);
  if (arguments.n_items_max > kItemsMax) {
    return absl::InvalidArgumentError(absl::StrCat("PagedDecodeAttention: n_pieces_max ",
                                                   workspace.n_pieces_max, " for ", pool.n_kv_heads,
                                                   " kv heads, together at most ", kItemsMax));
  }
  arguments.sums = workspace.partials;
  arguments.softmax = reinterpret_cast<float2*>(
      workspace.partials + arguments.n_items_max * arguments.parts.n_heads * pool.head_dim);
  arguments.counters = workspace.counters;
  return ForHeadDim("PagedDecodeAttention", pool.head_dim,
                    [&]<int kDim>() { return Launch<kDim>(params, arguments); });
}

}  // namespace walsh::kernels::cuda
