// PagedDecodeAttention (worker/kernels/cuda/paged_attention.h).
//
// A cluster of kCtas CTAs takes a sequence and a kv head. Blocks of its context go to the cluster's
// warps in turn, so that few blocks are spread over as many multiprocessors; a warp copies keys and
// values of its blocks to shared memory by itself, as many at once as there is room for, and meets
// no other warp until it has seen them all. Tokens are the rows of mma.m16n8k16 and query heads the
// columns, unused ones zero: the tensor cores are far from busy, and one form serves groups from 1
// to 8. Where a group has more heads, it is taken in parts.
//
// What is known before the kernel before this one is done is done by then: numbers of the sequence,
// its table, the first keys and values, the angles of its position. Behind it lie one load of the
// row, its transform, the products and two exchanges of partial results, of the CTA's warps and of
// the cluster's CTAs.
#include <algorithm>
#include <cmath>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cluster.cuh"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/qkv_head.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kCtas = 8;  // of a cluster, as many as every device takes
constexpr int kClusterWarps = kCtas * kWarps;
constexpr int kHeadColumns = 8;  // query heads at once, of mma's columns
static_assert(kPoolBlockTokens == 16, "a block's tokens are mma's rows");
constexpr int kVectorsTogether = 4;       // of a result's 4 elements, that a CTA writes as a sector
constexpr int64_t kSequencesMax = 65535;  // of a grid's rows

// How the query heads of a kv head are cut.
struct HeadParts {
  int n_parts;
  int n_heads;  // of a part; the last may have fewer
};
HeadParts PartsOf(int64_t queries_per_key) {
  const int64_t n_parts = (queries_per_key + kHeadColumns - 1) / kHeadColumns;
  return {static_cast<int>(n_parts), static_cast<int>((queries_per_key + n_parts - 1) / n_parts)};
}

struct DecodeArguments {
  PagedAttentionArguments attention;  // but for q
  bf16* pool;
  HeadParts parts;
  const float* qkv;
  int64_t qkv_stride;
  QkvTransform transform;
};

template <int kDim>
struct DecodeForm {
  static constexpr int kPairs = HeadPairsOf(kDim);
  static constexpr int kPieces = kDim / 8;     // of 16 bytes, of a token
  static constexpr int kVectors = kDim / 4;    // of fp32, of a head
  static constexpr int kSumStride = kDim + 4;  // lanes that write meet no bank twice
  // Blocks of a warp that are under way at once.
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 2 : 1;
  static constexpr int kCtasOfMultiprocessor = kDim <= 128 ? 3 : 2;
  static constexpr unsigned kTileBytes = TileBytes<kDim>(kPoolBlockTokens, 0);
  static_assert(kTileBytes >= kHeadColumns * kSumStride * sizeof(float));

  struct Shared {
    // Of a warp and stage, keys and values. A warp's sums take the place of the first.
    alignas(16) unsigned char tiles[kWarps][kStages][2][kTileBytes];
    union {
      alignas(16) bf16 q[kHeadColumns][kDim + kTilePad];
      // What the cluster's CTAs have for this one to add up. None sends it before all have read q.
      float4 received[kCtas][kVectors];
    };
    float2 received_softmax[kCtas][kHeadColumns];  // maximum (of log2) and sum of weights
    float2 softmax[kWarps][kHeadColumns];
    alignas(16) bf16 token[2][kDim];  // the new one's key and value
  };
};

// Softmax of several parts of a context: the maximum of all and the weights' sum with it.
template <int kParts>
__device__ __forceinline__ float2 MergeSoftmax(const float2 (*parts)[kHeadColumns], int head) {
  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kParts; ++i) highest = fmaxf(highest, parts[i][head].x);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (parts[i][head].x == -INFINITY) continue;
    sum = fmaf(parts[i][head].y, Exp2(parts[i][head].x - highest), sum);
  }
  return {highest, sum};
}
__device__ __forceinline__ void AddWeighted(float4& sum, float4 part, float weight) {
  sum.x = fmaf(part.x, weight, sum.x);
  sum.y = fmaf(part.y, weight, sum.y);
  sum.z = fmaf(part.z, weight, sum.z);
  sum.w = fmaf(part.w, weight, sum.w);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, DecodeForm<kDim>::kCtasOfMultiprocessor)
    DecodeKernel(const __grid_constant__ DecodeArguments p) {
  using Form = DecodeForm<kDim>;
  constexpr int kHalf = kDim / 2;
  constexpr int kStages = Form::kStages;
  constexpr int kVectors = Form::kVectors;
  constexpr int kHeadStride = kPoolBlockTokens * kDim;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Form::Shared*>(shared_bytes);
  LetNextKernelStart();

  const PagedAttentionArguments& a = p.attention;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int rank = static_cast<int>(blockIdx.x) % kCtas;
  const int unit = static_cast<int>(blockIdx.x) / kCtas;
  const int kv_head = unit / p.parts.n_parts;
  const int part = unit - kv_head * p.parts.n_parts;
  const int n_heads = min(p.parts.n_heads, a.queries_per_key - part * p.parts.n_heads);
  const int first_head = kv_head * a.queries_per_key + part * p.parts.n_heads;
  const auto sequence = static_cast<int64_t>(blockIdx.y);

  // -- Where the context lies ---------------------------------------------------------------------
  // Blocks are numbered from the sequence's start. This warp has first_block and each kClusterWarps
  // further; a lane holds the place in the pool of one of 32 of them.
  const int warp_of_cluster = warp * kCtas + rank;
  const int32_t* table = a.batch.tables + sequence * a.batch.max_blocks;
  const auto places_from = [&](int block) {
    block += lane * kClusterWarps;
    return block < a.batch.max_blocks ? table[block] : 0;
  };
  int32_t places = places_from(warp_of_cluster);
  const int position = a.batch.n_past[sequence];
  const int64_t row = a.batch.first_row[sequence];
  if (a.batch.n_sequence_rows[sequence] == 0) {
    WaitForPreviousKernel();
    return;
  }
  const int first_seen = a.FirstSeen(position);
  const int last_block = position / kPoolBlockTokens;
  int first_block = warp_of_cluster;
  if (a.window > 0) {
    const int before = max(0, first_seen / kPoolBlockTokens - first_block);
    first_block += (before + kClusterWarps - 1) / kClusterWarps * kClusterWarps;
    places = places_from(first_block);
  }
  const int n_blocks =
      first_block > last_block ? 0 : (last_block - first_block) / kClusterWarps + 1;
  int32_t places_after = places_from(first_block + kWarpSize * kClusterWarps);

  // -- Copies of keys and values, in groups: those of the warp's block i are groups 2i and 2i + 1
  // ---
  const auto tile_of = [&](int i, int is_value) {
    return SharedAddress(shared.tiles[warp][i % kStages][is_value]);
  };
  const auto copy = [&](int i, unsigned tile, const bf16* from) {
    const int first = (first_block + i * kClusterWarps) * kPoolBlockTokens;
#pragma unroll
    for (int c = 0; c < kPoolBlockTokens * Form::kPieces / kWarpSize; ++c) {
      const int piece = c * kWarpSize + lane;
      const int token_of_block = piece / Form::kPieces;
      const int token = first + token_of_block;
      // The new token is not in the pool yet; zeros where none is seen.
      if (token == position) continue;
      CopyAsync16(tile + TileBytes<kDim>(token_of_block, piece % Form::kPieces * 8),
                  from + piece * 8, token >= first_seen && token < position);
    }
  };
  const bf16* copied = nullptr;  // the block whose keys are copied
  const auto copy_keys = [&](int i) {
    if (i < n_blocks) {
      if (i % kWarpSize == 0 && i > 0) {
        places = places_after;
        places_after = places_from(first_block + (i + kWarpSize) * kClusterWarps);
      }
      const int64_t place = __shfl_sync(~0u, places, i % kWarpSize);
      copied = p.pool + place * a.block_stride + kv_head * kHeadStride;
      copy(i, tile_of(i, 0), copied);
    }
    CommitCopies();
  };
  const auto copy_values = [&](int i) {
    if (i < n_blocks) copy(i, tile_of(i, 1), copied + a.block_stride / 2);
    CommitCopies();
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    copy_keys(i);
    copy_values(i);
  }

  // -- The row's heads: queries, and the new token's key and value in the CTA that has its block
  // ----
  constexpr int kHeadsOfWarp = (kHeadColumns + 2 + kWarps - 1) / kWarps;
  const bool has_token = last_block % kCtas == rank;
  const int n_row_heads = n_heads + (has_token ? 2 : 0);
  const auto column_of = [&](int h) {
    const int head =
        h < n_heads ? first_head + h : a.n_kv_heads * (a.queries_per_key + h - n_heads) + kv_head;
    return head * kDim;
  };
  const QkvTransform& transform = p.transform;
  const HeadRotation<Form::kPairs> rotation =
      RotationAt<Form::kPairs>(position, transform.inverse_frequencies, kHalf);
  HeadPairs<Form::kPairs> bias[kHeadsOfWarp];
  HeadPairs<Form::kPairs> norm[kHeadsOfWarp];
  const auto norm_of = [&](int h) { return h < n_heads ? transform.q_norm : transform.k_norm; };
#pragma unroll
  for (int i = 0; i < kHeadsOfWarp; ++i) {
    const int h = warp + i * kWarps;
    if (h >= n_row_heads) continue;
    if (transform.bias != nullptr) {
      bias[i] = LoadHead<Form::kPairs>(transform.bias + column_of(h), kHalf);
    }
    if (h <= n_heads && norm_of(h) != nullptr) norm[i] = LoadHead<Form::kPairs>(norm_of(h), kHalf);
  }
  bf16* token_in_pool = nullptr;
  if (has_token) {
    token_in_pool = p.pool + static_cast<int64_t>(table[last_block]) * a.block_stride +
                    kv_head * kHeadStride + position % kPoolBlockTokens * kDim;
  }
  for (int i = thread; i < (kHeadColumns - n_heads) * (kDim + kTilePad); i += kThreads) {
    shared.q[n_heads][i] = __float2bfloat16_rn(0.0f);
  }

  WaitForPreviousKernel();
  HeadPairs<Form::kPairs> x[kHeadsOfWarp];
#pragma unroll
  for (int i = 0; i < kHeadsOfWarp; ++i) {
    const int h = warp + i * kWarps;
    if (h >= n_row_heads) continue;
    x[i] = LoadHead<Form::kPairs>(p.qkv + row * p.qkv_stride + column_of(h), kHalf);
  }
#pragma unroll
  for (int i = 0; i < kHeadsOfWarp; ++i) {
    const int h = warp + i * kWarps;
    if (h >= n_row_heads) continue;
    if (transform.bias != nullptr) AddBias(x[i], bias[i]);
    if (h <= n_heads) {
      if (norm_of(h) != nullptr) NormalizeHead(x[i], norm[i], kDim, transform.eps);
      RotateHead(x[i], rotation);
    }
    const int is_value = h - n_heads;
    StoreHead(h < n_heads ? shared.q[h] : shared.token[is_value], x[i], kHalf);
    if (h >= n_heads && part == 0) {
      StoreHead(token_in_pool + is_value * (a.block_stride / 2), x[i], kHalf);
    }
  }
  __syncthreads();
  unsigned query[kDim / 16][2];
  const auto* q = reinterpret_cast<const unsigned*>(shared.q[lane / 4]) + lane % 4;
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    query[d][0] = q[d * 8];
    query[d][1] = q[d * 8 + 4];
  }
  ArriveAtCluster();

  // -- The warp's blocks
  // ----------------------------------------------------------------------------
  const unsigned k_lane = TileBytes<kDim>(lane % 16, lane / 16 * 8);
  const unsigned v_lane = TileBytes<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const auto put_token = [&](int i, int is_value) {
    if (lane < Form::kPieces) {
      unsigned char* tile = shared.tiles[warp][i % kStages][is_value];
      *reinterpret_cast<uint4*>(tile + TileBytes<kDim>(position % kPoolBlockTokens, lane * 8)) =
          reinterpret_cast<const uint4*>(shared.token[is_value])[lane];
    }
  };
  // Of the lane's two query heads.
  float highest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float out[kDim / 16][4] = {};
  for (int i = 0; i < n_blocks; ++i) {
    const int block = first_block + i * kClusterWarps;
    const bool is_last = block == last_block;
    // Of the 2 (kStages + i) groups so far, all up to the block's keys.
    WaitForCopies<2 * kStages - 1>();
    if (is_last) put_token(i, 0);
    __syncwarp();
    float score[4] = {};
    float score_of_odd[4] = {};  // a second chain of products
    const unsigned k_tile = tile_of(i, 0) + k_lane;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned keys[4];
      LoadMatrix4(keys, k_tile + TileBytes<kDim>(0, d * 16));
      Mma(d % 2 == 0 ? score : score_of_odd, keys, query[d][0], query[d][1]);
    }
    __syncwarp();  // the keys are done with
    copy_keys(i + kStages);

    float correction[2];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] += score_of_odd[e];
      const int token = block * kPoolBlockTokens + lane / 4 + e / 2 * 8;
      if (token < first_seen || token > position) score[e] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = fmaxf(score[h], score[h + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
      }
      largest = fmaxf(highest[h], largest * a.scale_log2);
      correction[h] = Exp2(highest[h] - largest);
      highest[h] = largest;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = Exp2(fmaf(score[e], a.scale_log2, -highest[e % 2]));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = fmaf(sum[h], correction[h], score[h] + score[h + 2]);
    const unsigned weights[2] = {TransposeMatrix(PackBf16(score[0], score[1])),
                                 TransposeMatrix(PackBf16(score[2], score[3]))};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] *= correction[e % 2];
    }

    WaitForCopies<2 * kStages - 1>();
    if (is_last) put_token(i, 1);
    __syncwarp();
    const unsigned v_tile = tile_of(i, 1) + v_lane;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned values[4];
      LoadMatrix4Transposed(values, v_tile + TileBytes<kDim>(0, d * 16));
      Mma(out[d], values, weights[0], weights[1]);
    }
    __syncwarp();  // the values are done with
    copy_values(i + kStages);
  }

  // -- What the CTA's warps have ----------------------------------------------------------------
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], offset);
    }
    if (lane < 4) shared.softmax[warp][lane * 2 + h] = {highest[h], sum[h]};
  }
  const auto sums_of = [&](int w) { return reinterpret_cast<float*>(shared.tiles[w][0][0]); };
  if (n_blocks > 0) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int head = lane % 4 * 2 + e % 2;
      if (head >= n_heads) continue;
      float* to = sums_of(warp) + head * Form::kSumStride + lane / 4 + e / 2 * 8;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) to[d * 16] = out[d][e];
    }
  }
  __syncthreads();

  // -- … goes to the CTAs that add up the cluster's: four vectors to each in turn ----------------
  WaitForCluster();  // all have begun, and read their queries
  const int n_vectors = n_heads * kVectors;
  for (int v = thread; v < n_vectors; v += kThreads) {
    const int head = v / kVectors;
    const float largest = MergeSoftmax<kWarps>(shared.softmax, head).x;
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float of_warp = shared.softmax[w][head].x;
      if (of_warp == -INFINITY) continue;  // it had no blocks and has no sums
      const float* sums = sums_of(w) + head * Form::kSumStride + v % kVectors * 4;
      AddWeighted(total, *reinterpret_cast<const float4*>(sums), Exp2(of_warp - largest));
    }
    const int turn = v / kVectorsTogether;
    const int slot = turn / kCtas * kVectorsTogether + v % kVectorsTogether;
    StoreInCluster(AddressInCta(&shared.received[rank][slot], turn % kCtas), total);
  }
  if (thread < kCtas * kHeadColumns && thread % kHeadColumns < n_heads) {
    const int head = thread % kHeadColumns;
    StoreInCluster(AddressInCta(&shared.received_softmax[rank][head], thread / kHeadColumns),
                   MergeSoftmax<kWarps>(shared.softmax, head));
  }
  ArriveAtCluster();
  WaitForCluster();

  bf16* y = a.y + row * a.y_stride + first_head * kDim;
  for (int slot = thread; slot < kVectors; slot += kThreads) {
    const int turn = slot / kVectorsTogether * kCtas + rank;
    const int v = turn * kVectorsTogether + slot % kVectorsTogether;
    if (v >= n_vectors) continue;
    const int head = v / kVectors;
    const float2 softmax = MergeSoftmax<kCtas>(shared.received_softmax, head);
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < kCtas; ++c) {
      AddWeighted(total, shared.received[c][slot],
                  Exp2(shared.received_softmax[c][head].x - softmax.x));
    }
    const float inverse = 1.0f / softmax.y;
    *reinterpret_cast<uint2*>(y + v * 4) = {PackBf16(total.x * inverse, total.y * inverse),
                                            PackBf16(total.z * inverse, total.w * inverse)};
  }
}

template <int kDim>
absl::Status Launch(const PagedDecodeParams& params, const DecodeArguments& arguments) {
  constexpr int kShared = static_cast<int>(sizeof(typename DecodeForm<kDim>::Shared));
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      DecodeKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int64_t n_units = params.pool.shape.n_kv_heads * arguments.parts.n_parts;
  return LaunchKernel("PagedDecodeAttention", DecodeKernel<kDim>,
                      {.grid = dim3(static_cast<unsigned>(n_units * kCtas),
                                    static_cast<unsigned>(params.batch.n_sequences)),
                       .threads = kThreads,
                       .shared_bytes = kShared,
                       .cluster = kCtas,
                       .overlap_previous = params.overlap_previous,
                       .stream = params.stream},
                      arguments);
}

}  // namespace

absl::Status PagedDecodeAttention(const PagedDecodeParams& params) {
  constexpr const char* kName = "PagedDecodeAttention";
  DecodeArguments arguments{};
  WALSH_RETURN_IF_ERROR(MakeArguments(kName,
                                      {.batch = params.batch,
                                       .pool = params.pool,
                                       .n_heads = params.n_heads,
                                       .window = params.window,
                                       .scale = params.scale,
                                       .y = params.y,
                                       .y_stride = params.y_stride},
                                      &arguments.attention));
  WALSH_RETURN_IF_ERROR(CheckTransform(kName, params.transform));
  const KvPoolShape& pool = params.pool.shape;
  const int64_t width = (params.n_heads + 2 * pool.n_kv_heads) * pool.head_dim;
  arguments.qkv = params.qkv;
  arguments.qkv_stride = params.qkv_stride == 0 ? width : params.qkv_stride;
  if (arguments.qkv_stride < width || arguments.qkv_stride % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(kName, ": qkv_stride ", params.qkv_stride,
                                                   ", must be even and at least ", width));
  }
  if (reinterpret_cast<uintptr_t>(params.qkv) % sizeof(float2) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(kName, ": qkv must begin at a multiple of 8 bytes"));
  }
  if (params.batch.n_sequences > kSequencesMax) {
    return absl::InvalidArgumentError(absl::StrCat(kName, ": a batch of ", params.batch.n_sequences,
                                                   " sequences, the limit is ", kSequencesMax));
  }
  if (params.batch.n_sequences == 0) return absl::OkStatus();
  arguments.pool = params.pool.data;
  arguments.parts = PartsOf(arguments.attention.queries_per_key);
  arguments.transform = params.transform;
  return ForHeadDim(kName, pool.head_dim,
                    [&]<int kDim>() { return Launch<kDim>(params, arguments); });
}

}  // namespace walsh::kernels::cuda
