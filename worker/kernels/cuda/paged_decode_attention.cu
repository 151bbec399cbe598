// PagedDecodeAttention (worker/kernels/cuda/paged_attention.h).
//
// A cluster of CTAs takes a sequence and a kv head. The blocks of its context are dealt to kLeaves
// leaves of kWarps warps in turn; what a leaf's warps have is added up at once, leaves are added up
// two by two. A CTA has one, two or four leaves that are neighbours in this tree, one after the
// other: with few sequences in the batch a cluster has as many CTAs as there are leaves, so that a
// short context is spread over as many multiprocessors; with many it has two, as a CTA's beginning
// and end cost more than what it reads. The tree is the same.
//
// A warp copies keys and values of its blocks to shared memory by itself, as many at once as there
// is room for, over the ends of leaves. Tokens are the rows of mma.m16n8k16 and query heads the
// columns, unused ones zero: the tensor cores are far from busy, and one form serves groups from 1
// to 8. Where a group has more heads, it is taken in parts.
//
// Codes of a quantized pool go from shared memory to operands in registers (kv_codes.cuh). Each
// lane takes the neighbours that its words have, which is another order of the head's elements than
// that of bf16: the queries are loaded in the order of the keys, and results go where the values'
// order says. Scales multiply the scores, and the weights of values, in fp32.
//
// What is known before the kernel before this one is done is done by then: numbers of the sequence,
// its table, the first keys and values, the angles of its position. Behind it lie one load of the
// row, its transform, the products and two exchanges of partial results, of the CTA's warps and of
// the cluster's CTAs.
#include <algorithm>
#include <cmath>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cluster.cuh"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/current_device.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/kv_codes.cuh"
#include "worker/kernels/cuda/mma.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/qkv_head.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLeavesLog2 = 3;
constexpr int kLeaves = 1 << kLeavesLog2;  // CTAs of a cluster at most, as many as a device takes
constexpr int kCtasMin = 2;
constexpr int kTreeWarps = kLeaves * kWarps;
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
  unsigned char* pool;
  float clip;  // of its grids
  HeadParts parts;
  const float* qkv;
  int64_t qkv_stride;
  QkvTransform transform;
};

// kBits: of the pool. kInGroups: a head has several grids, of 32 elements or more each.
template <int kDimOfHead, int kBitsOfPool, bool kHasGroups>
struct DecodeForm {
  static constexpr int kDim = kDimOfHead;
  static constexpr int kBits = kBitsOfPool;
  static constexpr bool kInGroups = kHasGroups;
  static constexpr bool kIsQuantized = kBits != KvForm::kBf16;
  static constexpr int kPairs = HeadPairsOf(kDim);
  static constexpr int kRowBytes = kDim * kBits / 8;  // of a token
  static constexpr int kPieces = kRowBytes / 16;      // of 16 bytes, of a token
  static constexpr int kVectors = kDim / 4;           // of fp32, of a head
  static constexpr int kSumStride = kDim + 4;         // lanes that write meet no bank twice
  // Tokens of a tile, which is padded as those of mma.cuh are: 16 bytes a row.
  static constexpr int kTileStride = kRowBytes + 16;
  static constexpr int kGroupsMax = !kIsQuantized ? 0 : kInGroups ? kDim / 32 : 1;
  // Blocks of a warp that are under way at once.
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? (kBits == 4 ? 3 : 2) : 1;
  static constexpr int kCtasOfMultiprocessor = kDim <= 128 ? 3 : 2;
  // The last row needs no padding behind it. Grids follow, [token][group].
  static constexpr int kGridsAt = kTileStride * kPoolBlockTokens - 16;
  static constexpr int kGridBytes = kGroupsMax * static_cast<int>(sizeof(uint32_t));
  static constexpr int kTileBytes = kGridsAt + kPoolBlockTokens * kGridBytes;
  static constexpr int kSumBytes = kHeadColumns * kSumStride * static_cast<int>(sizeof(float));

  struct Shared {
    // Of a warp and stage. A warp's sums take the place of a leaf's last values.
    struct Tiles {
      alignas(16) unsigned char keys[kTileBytes];
      alignas(16) unsigned char values[kTileBytes > kSumBytes ? kTileBytes : kSumBytes];
    };
    Tiles tiles[kWarps][kStages];
    union {
      alignas(16) bf16 q[kHeadColumns][kDim + kTilePad];
      // What the cluster's CTAs have for this one to add up. None sends it before all have read q.
      float4 received[kLeaves * kVectors];  // [CTA][slot]
    };
    float2 received_softmax[kLeaves][kHeadColumns];  // maximum (of log2) and sum of weights
    float2 softmax[kWarps][kHeadColumns];
    int sums_stage[kWarps];  // where a warp's sums are
    uint64_t barrier;        // of what is received
    // The new one's key and value, and their grids.
    alignas(16) unsigned char token[2][kRowBytes];
    uint32_t token_grids[2][kGroupsMax > 0 ? kGroupsMax : 1];
    // To sort heads by sequency, a warp each.
    float scratch[kInGroups ? kWarps : 1][kInGroups ? kDim : 1];

    __device__ __forceinline__ unsigned char* TileOf(int warp, int stage, int is_value) {
      Tiles& both = tiles[warp][stage];
      return is_value == 0 ? both.keys : both.values;
    }
    __device__ __forceinline__ const float* SumsOf(int warp, int stage) const {
      return reinterpret_cast<const float*>(tiles[warp][stage].values);
    }
    __device__ __forceinline__ float* SumsOf(int warp, int stage) {
      return reinterpret_cast<float*>(tiles[warp][stage].values);
    }
  };
  static constexpr int kSharedOfMultiprocessor = 228 * 1024;  // 1 KiB of it is lost for each CTA
  static_assert(kCtasOfMultiprocessor * (sizeof(Shared) + 1024) <= kSharedOfMultiprocessor);
};

// What a warp has of its blocks so far. Of the results of mma.m16n8k16 a lane has query heads
// lane % 4 · 2 and the next, tokens or elements lane / 4 and lane / 4 + 8.
template <int kDim>
struct WarpSums {
  float highest[2] = {-INFINITY, -INFINITY};  // of the scores, as powers of two
  float weights[2] = {0.0f, 0.0f};            // this lane's, added up
  float out[kDim / 16][4] = {};

  // Takes in a block's scores, of which those that are not seen are −infinity. `weight`: for the
  // product with its values.
  __device__ __forceinline__ void AddScores(const float (&score)[4], float scale_log2,
                                            float (&weight)[4]) {
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = fmaxf(score[h], score[h + 2]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
      }
      largest = fmaxf(highest[h], largest * scale_log2);
      correction[h] = Exp2(highest[h] - largest);
      highest[h] = largest;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) weight[e] = Exp2(fmaf(score[e], scale_log2, -highest[e % 2]));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      weights[h] = fmaf(weights[h], correction[h], weight[h] + weight[h + 2]);
    }
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] *= correction[e % 2];
    }
  }
};

// As the operand of the product with the values, which has them as columns.
__device__ __forceinline__ void PackWeights(const float (&weight)[4], unsigned (&packed)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    packed[h] = TransposeMatrix(PackBf16(weight[2 * h], weight[2 * h + 1]));
  }
}

// Scores of a block's tokens.
template <int kDim>
__device__ __forceinline__ void MultiplyKeys(unsigned tile, const unsigned (&query)[kDim / 16][2],
                                             float (&score)[4]) {
  float of_odd[4] = {};  // a second chain of products
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    unsigned keys[4];
    LoadMatrix4(keys, tile + TileBytes<kDim>(0, d * 16));
    Mma(d % 2 == 0 ? score : of_odd, keys, query[d][0], query[d][1]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) score[e] += of_odd[e];
}

template <int kDim>
__device__ __forceinline__ void MultiplyValues(unsigned tile, const unsigned (&weights)[2],
                                               float (&out)[kDim / 16][4]) {
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    unsigned values[4];
    LoadMatrix4Transposed(values, tile + TileBytes<kDim>(0, d * 16));
    Mma(out[d], values, weights[0], weights[1]);
  }
}

// -- The same for codes --------------------------------------------------------------------------
//
// Of the elements 32c to 32c + 31 of a token, products 2c and 2c + 1 take 4 each of a lane's.

// Where the two neighbours lie that are register `i` of the operand `query[d]`, in pairs.
template <int kBits>
__device__ __forceinline__ int QueryPair(int d, int i, int lane) {
  if constexpr (kBits == 8) return d * 8 + lane % 4 * 2 + i;
  if constexpr (kBits == 4) return d / 2 * 16 + lane % 4 * 4 + d % 2 * 2 + i;
  return d * 8 + lane % 4 + i * 4;
}
// The head's element that out[d] has of this lane, its first two numbers or (h = 1) its last.
template <int kBits>
__device__ __forceinline__ int OutElement(int d, int h, int lane) {
  const int row = lane / 4;
  if constexpr (kBits == 8) return d / 2 * 32 + row * 4 + d % 2 * 2 + h;
  if constexpr (kBits == 4) return d / 2 * 32 + row / 2 * 8 + row % 2 + d % 2 * 4 + h * 2;
  return d * 16 + row + h * 8;
}

// A tile of codes and the grids behind it.
template <typename Form>
struct CodeTile {
  const unsigned char* bytes;
  int n_groups;
  int group_size_log2;

  template <typename Word>
  __device__ __forceinline__ Word WordAt(int token, int byte) const {
    return *reinterpret_cast<const Word*>(bytes + token * Form::kTileStride + byte);
  }
  // Of elements 32c to 32c + 31.
  __device__ __forceinline__ uint32_t GridAt(int token, int c) const {
    const auto* grids = reinterpret_cast<const uint32_t*>(bytes + Form::kGridsAt);
    if constexpr (!Form::kInGroups) return grids[token];
    return grids[token * n_groups + (c * 32 >> group_size_log2)];
  }
};

template <typename Form>
__device__ __forceinline__ void MultiplyKeyCodes(const CodeTile<Form>& tile,
                                                 const unsigned (&query)[Form::kDim / 16][2],
                                                 float (&score)[4]) {
  constexpr int kChunks = Form::kDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int tokens[2] = {lane / 4, lane / 4 + 8};
  uint32_t grid[2];
  float sum[2][4] = {};  // of even and of odd products
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (Form::kInGroups || c == 0) {
#pragma unroll
      for (int t = 0; t < 2; ++t) grid[t] = tile.GridAt(tokens[t], c);
    }
    unsigned keys[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if constexpr (Form::kBits == 8) {
        using Pairs = CodePairs<8>;
        const float magic = Pairs::MagicOf(ZeroOf(grid[t]));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const auto word =
              tile.template WordAt<uint32_t>(tokens[t], c * 32 + m * 16 + lane % 4 * 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            keys[m][i * 2 + t] =
                PackBf16(Pairs::Value(word, i * 2, magic), Pairs::Value(word, i * 2 + 1, magic));
          }
        }
      } else {
        using Pairs = CodePairs<4>;
        const uint32_t magic = Pairs::MagicOf(ZeroOf(grid[t]), ZeroOf(grid[t]));
        const auto word = tile.template WordAt<uint32_t>(tokens[t], c * 16 + lane % 4 * 4);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) keys[m][i * 2 + t] = Pairs::Pair(word, m * 2 + i, magic);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) Mma(sum[m], keys[m], query[c * 2 + m][0], query[c * 2 + m][1]);
    if (Form::kInGroups || c + 1 == kChunks) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[e] = fmaf(ScaleOf(grid[e / 2]), sum[0][e] + sum[1][e], score[e]);
        sum[0][e] = sum[1][e] = 0.0f;
      }
    }
  }
}

template <typename Form>
__device__ __forceinline__ void MultiplyValueCodes(const CodeTile<Form>& tile,
                                                   const float (&weight)[4],
                                                   float (&out)[Form::kDim / 16][4]) {
  constexpr int kChunks = Form::kDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first = lane % 4 * 2;  // of the tokens first, first + 1, first + 8, first + 9
  const int row = lane / 4;
  unsigned weights[2];
  int zero[4];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (Form::kInGroups || c == 0) {
      const float scale[2] = {ScaleOf(tile.GridAt(row, c)), ScaleOf(tile.GridAt(row + 8, c))};
      const float scaled[4] = {weight[0] * scale[0], weight[1] * scale[0], weight[2] * scale[1],
                               weight[3] * scale[1]};
      PackWeights(scaled, weights);
#pragma unroll
      for (int t = 0; t < 4; ++t) zero[t] = ZeroOf(tile.GridAt(first + t % 2 + t / 2 * 8, c));
    }
    unsigned values[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {  // pairs of tokens
      const int token = first + t * 8;
      if constexpr (Form::kBits == 8) {
        using Pairs = CodePairs<8>;
        const auto low = tile.template WordAt<uint32_t>(token, c * 32 + row * 4);
        const auto high = tile.template WordAt<uint32_t>(token + 1, c * 32 + row * 4);
        const float magic_of_low = Pairs::MagicOf(zero[t * 2]);
        const float magic_of_high = Pairs::MagicOf(zero[t * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[i / 2][t * 2 + i % 2] =
              PackBf16(Pairs::Value(low, i, magic_of_low), Pairs::Value(high, i, magic_of_high));
        }
      } else {
        using Pairs = CodePairs<4>;
        const auto low = tile.template WordAt<uint16_t>(token, c * 16 + row * 2);
        const auto high = tile.template WordAt<uint16_t>(token + 1, c * 16 + row * 2);
        const uint32_t word = low | static_cast<uint32_t>(high) << 16;
        const uint32_t magic = Pairs::MagicOf(zero[t * 2], zero[t * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i / 2][t * 2 + i % 2] = Pairs::Pair(word, i, magic);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) Mma(out[c * 2 + m], values[m], weights[0], weights[1]);
  }
}

// Four elements of a head's result over a part of the context, and that part's softmax.
struct Partial {
  float highest;
  float weights;  // their sum, with that maximum
  float4 sum;
};
__device__ __forceinline__ float WeightOf(float highest_of_part, float highest) {
  return highest_of_part == -INFINITY ? 0.0f : Exp2(highest_of_part - highest);
}
__device__ __forceinline__ Partial Merge(const Partial& a, const Partial& b) {
  Partial both;
  both.highest = fmaxf(a.highest, b.highest);
  const float of_a = WeightOf(a.highest, both.highest);
  const float of_b = WeightOf(b.highest, both.highest);
  const auto merged = [&](float x, float y) { return fmaf(x, of_a, __fmul_rn(y, of_b)); };
  both.weights = merged(a.weights, b.weights);
  both.sum = {merged(a.sum.x, b.sum.x), merged(a.sum.y, b.sum.y), merged(a.sum.z, b.sum.z),
              merged(a.sum.w, b.sum.w)};
  return both;
}

// What the leaf's warps have of four elements, `vector` of the heads' results.
template <typename Form>
__device__ __forceinline__ Partial MergeWarps(const typename Form::Shared& shared, int vector) {
  const int head = vector / Form::kVectors;
  const int at = head * Form::kSumStride + vector % Form::kVectors * 4;
  Partial all{-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all.highest = fmaxf(all.highest, shared.softmax[w][head].x);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float2 softmax = shared.softmax[w][head];
    if (softmax.x == -INFINITY) continue;  // it had no blocks and has no sums
    const float weight = Exp2(softmax.x - all.highest);
    const float4 x = *reinterpret_cast<const float4*>(shared.SumsOf(w, shared.sums_stage[w]) + at);
    all.weights = fmaf(softmax.y, weight, all.weights);
    all.sum.x = fmaf(x.x, weight, all.sum.x);
    all.sum.y = fmaf(x.y, weight, all.sum.y);
    all.sum.z = fmaf(x.z, weight, all.sum.z);
    all.sum.w = fmaf(x.w, weight, all.sum.w);
  }
  return all;
}

template <typename Form, int kCtas>
__global__ void __launch_bounds__(kThreads, Form::kCtasOfMultiprocessor)
    DecodeKernel(const __grid_constant__ DecodeArguments p) {
  constexpr int kDim = Form::kDim;
  constexpr int kHalf = kDim / 2;
  constexpr int kStages = Form::kStages;
  constexpr int kVectors = Form::kVectors;
  constexpr int kCtaLeaves = kLeaves / kCtas;
  constexpr int kSlots = kLeaves * kVectors / kCtas;  // of a CTA, for as many heads as can be
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Form::Shared*>(shared_bytes);
  // With many sequences the next kernel's CTAs would take room that this one's need.
  if (kCtas == kLeaves) LetNextKernelStart();

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
  // Blocks are numbered from the sequence's start. Of leaf l this warp has each kTreeWarps-th from
  // a number below that on; the bits of l are turned round, so that neighbours are in other CTAs. A
  // lane holds the place in the pool of one of 32 blocks.
  const auto block_of_leaf = [&](int leaf) {
    const unsigned turned = __brev(static_cast<unsigned>(rank * kCtaLeaves + leaf));
    return warp * kLeaves + static_cast<int>(turned >> (32 - kLeavesLog2));
  };
  const int32_t* table = a.batch.tables + sequence * a.batch.max_blocks;
  const auto places_from = [&](int block) {
    block += lane * kTreeWarps;
    return block < a.batch.max_blocks ? table[block] : 0;
  };
  int32_t places = places_from(block_of_leaf(0));
  const int position = a.batch.n_past[sequence];
  const int64_t row = a.batch.first_row[sequence];
  if (a.batch.n_sequence_rows[sequence] == 0) {
    WaitForPreviousKernel();
    return;
  }
  const int first_seen = a.FirstSeen(position);
  const int last_block = position / kPoolBlockTokens;
  struct Run {
    int first;  // block, and each kTreeWarps further
    int n;
  };
  const auto run_of = [&](int leaf) {
    Run run{.first = block_of_leaf(leaf), .n = 0};
    if (a.window > 0) {
      const int before = max(0, first_seen / kPoolBlockTokens - run.first);
      run.first += (before + kTreeWarps - 1) / kTreeWarps * kTreeWarps;
    }
    if (run.first <= last_block) run.n = (last_block - run.first) / kTreeWarps + 1;
    return run;
  };

  // -- Copies of keys and values, in groups: 2i and 2i + 1 of the warp's i-th block --------------
  const auto tile_of = [&](int i, int is_value) {
    return SharedAddress(shared.TileOf(warp, i % kStages, is_value));
  };
  // The next block to be copied.
  int leaf_ahead = 0;
  Run run_ahead = run_of(0);
  int index_ahead = 0;
  int n_copied = 0;
  if (a.window > 0) places = places_from(run_ahead.first);
  const auto skip_empty_leaves = [&] {
    while (run_ahead.n == index_ahead && leaf_ahead < kCtaLeaves) {
      index_ahead = 0;
      run_ahead.n = 0;
      if (++leaf_ahead == kCtaLeaves) break;
      run_ahead = run_of(leaf_ahead);
      if (run_ahead.n > 0) places = places_from(run_ahead.first);
    }
  };
  skip_empty_leaves();
  const unsigned char* keys_ahead = nullptr;
  const auto copy = [&](unsigned tile, const unsigned char* from) {
    constexpr int kPiecesOfBlock = kPoolBlockTokens * Form::kPieces;
    const int first = (run_ahead.first + index_ahead * kTreeWarps) * kPoolBlockTokens;
    // The new token is not in the pool yet; zeros where none is seen.
    const auto is_seen = [&](int token) { return token >= first_seen && token < position; };
#pragma unroll
    for (int c = 0; c < (kPiecesOfBlock + kWarpSize - 1) / kWarpSize; ++c) {
      const int piece = c * kWarpSize + lane;
      if (kPiecesOfBlock % kWarpSize != 0 && piece >= kPiecesOfBlock) continue;
      const int token_of_block = piece / Form::kPieces;
      const int token = first + token_of_block;
      if (token == position) continue;
      CopyAsync16(tile + token_of_block * Form::kTileStride + piece % Form::kPieces * 16,
                  from + piece * 16, is_seen(token));
    }
    if constexpr (Form::kIsQuantized) {
      const int groups_log2 = Form::kInGroups ? __ffs(kDim) - 1 - a.group_size_log2 : 0;
      for (int i = lane; i < kPoolBlockTokens << groups_log2; i += kWarpSize) {
        const int token = first + (i >> groups_log2);
        if (token == position) continue;
        CopyAsync4(tile + Form::kGridsAt + i * 4, from + kPiecesOfBlock * 16 + i * 4,
                   is_seen(token));
      }
    }
  };
  const auto copy_keys = [&] {
    if (leaf_ahead < kCtaLeaves) {
      const int64_t place = __shfl_sync(~0u, places, index_ahead % kWarpSize);
      keys_ahead = p.pool + place * a.block_bytes + kv_head * a.head_bytes;
      copy(tile_of(n_copied, 0), keys_ahead);
    }
    CommitCopies();
  };
  const auto copy_values = [&] {
    if (leaf_ahead < kCtaLeaves) {
      copy(tile_of(n_copied, 1), keys_ahead + a.block_bytes / 2);
      ++n_copied;
      ++index_ahead;
      if (index_ahead % kWarpSize == 0 && index_ahead < run_ahead.n) {
        places = places_from(run_ahead.first + index_ahead * kTreeWarps);
      }
      skip_empty_leaves();
    }
    CommitCopies();
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    copy_keys();
    copy_values();
  }

  // -- The row's heads: queries, and where its block is the new token's key and value -------------
  constexpr int kHeadsOfWarp = (kHeadColumns + 2 + kWarps - 1) / kWarps;
  const unsigned leaf_of_token = __brev(static_cast<unsigned>(last_block)) >> (32 - kLeavesLog2);
  const bool has_token = static_cast<int>(leaf_of_token) / kCtaLeaves == rank;
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
  unsigned char* head_in_pool = nullptr;
  if (has_token) {
    head_in_pool =
        p.pool + static_cast<int64_t>(table[last_block]) * a.block_bytes + kv_head * a.head_bytes;
  }
  for (int i = thread; i < (kHeadColumns - n_heads) * (kDim + kTilePad); i += kThreads) {
    shared.q[n_heads][i] = __float2bfloat16_rn(0.0f);
  }

  const int n_vectors = n_heads * kVectors;
  if (thread == 0) {
    // Of each CTA, vectors in turns of kVectorsTogether, and all heads' softmax.
    const int n_turns = n_vectors / kVectorsTogether;
    const int n_received = (n_turns / kCtas + (rank < n_turns % kCtas ? 1 : 0)) * kVectorsTogether;
    BeginExchange(&shared.barrier, kCtas * (n_received * static_cast<int>(sizeof(float4)) +
                                            n_heads * static_cast<int>(sizeof(float2))));
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
      if constexpr (Form::kIsQuantized) {
        if (transform.heads != HeadTransform::kNone) {
          HadamardHead(x[i], kHalf);
          if constexpr (Form::kInGroups) {
            if (transform.heads == HeadTransform::kWalsh) {
              SortBySequency(x[i], kHalf, shared.scratch[warp]);
            }
          }
        }
      }
    }
    if (h < n_heads) {
      StoreHead(shared.q[h], x[i], kHalf);
      continue;
    }
    const int is_value = h - n_heads;
    unsigned char* head = head_in_pool + is_value * (a.block_bytes / 2);
    if constexpr (!Form::kIsQuantized) {
      StoreHead(reinterpret_cast<bf16*>(shared.token[is_value]), x[i], kHalf);
      if (part == 0) {
        StoreHead(reinterpret_cast<bf16*>(head) + position % kPoolBlockTokens * kDim, x[i], kHalf);
      }
    } else {
      const int n_groups = Form::kInGroups ? a.n_groups : 1;
      const int group = Form::kInGroups ? 1 << a.group_size_log2 : kDim;
      StoreHeadCodes<Form::kBits>(shared.token[is_value], shared.token_grids[is_value], x[i], kHalf,
                                  group, p.clip);
      __syncwarp();
      if (part == 0) {
        if (lane < Form::kPieces) {
          reinterpret_cast<uint4*>(head + position % kPoolBlockTokens * Form::kRowBytes)[lane] =
              reinterpret_cast<const uint4*>(shared.token[is_value])[lane];
        }
        if (lane < n_groups) {
          auto* grids = reinterpret_cast<uint32_t*>(head + kPoolBlockTokens * Form::kRowBytes);
          grids[position % kPoolBlockTokens * n_groups + lane] = shared.token_grids[is_value][lane];
        }
      }
    }
  }
  __syncthreads();
  unsigned query[kDim / 16][2];
  const auto* q = reinterpret_cast<const unsigned*>(shared.q[lane / 4]);
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) query[d][i] = q[QueryPair<Form::kBits>(d, i, lane)];
  }
  ArriveAtCluster();

  // -- Leaves --------------------------------------------------------------------------------
  constexpr int kVectorsOfThread = (kHeadColumns * kVectors + kThreads - 1) / kThreads;
  const unsigned k_lane = TileBytes<kDim>(lane % 16, lane / 16 * 8);
  const unsigned v_lane = TileBytes<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
  const auto put_token = [&](int i, int is_value) {
    unsigned char* tile = shared.TileOf(warp, i % kStages, is_value);
    const int token = position % kPoolBlockTokens;
    if (lane < Form::kPieces) {
      *reinterpret_cast<uint4*>(tile + token * Form::kTileStride + lane * 16) =
          reinterpret_cast<const uint4*>(shared.token[is_value])[lane];
    }
    if constexpr (Form::kIsQuantized) {
      const int n_groups = Form::kInGroups ? a.n_groups : 1;
      if (lane < n_groups) {
        reinterpret_cast<uint32_t*>(tile + Form::kGridsAt)[token * n_groups + lane] =
            shared.token_grids[is_value][lane];
      }
    }
  };
  const auto codes_of = [&](int i, int is_value) {
    return CodeTile<Form>{shared.TileOf(warp, i % kStages, is_value), a.n_groups,
                          a.group_size_log2};
  };
  Partial partial[kVectorsOfThread];  // of the leaves so far, where their number is a power of two
  Partial of_two[kVectorsOfThread];   // of pairs of leaves that wait for their neighbours
  Partial of_one[kVectorsOfThread];
  int n_seen = 0;  // blocks
  for (int leaf = 0; leaf < kCtaLeaves; ++leaf) {
    WarpSums<kDim> sums;
    const Run run = run_of(leaf);
    for (int i = 0; i < run.n; ++i) {
      const int block = run.first + i * kTreeWarps;
      const bool is_last = block == last_block;
      // Of the 2 (kStages + n_seen) groups so far, all up to the block's keys.
      WaitForCopies<2 * kStages - 1>();
      if (is_last) put_token(n_seen, 0);
      __syncwarp();
      float score[4] = {};
      if constexpr (Form::kIsQuantized) {
        MultiplyKeyCodes(codes_of(n_seen, 0), query, score);
      } else {
        MultiplyKeys<kDim>(tile_of(n_seen, 0) + k_lane, query, score);
      }
      __syncwarp();  // the keys are done with
      copy_keys();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = block * kPoolBlockTokens + lane / 4 + e / 2 * 8;
        if (token < first_seen || token > position) score[e] = -INFINITY;
      }
      float weight[4];
      sums.AddScores(score, a.scale_log2, weight);

      WaitForCopies<2 * kStages - 1>();
      if (is_last) put_token(n_seen, 1);
      __syncwarp();
      if constexpr (Form::kIsQuantized) {
        MultiplyValueCodes(codes_of(n_seen, 1), weight, sums.out);
      } else {
        unsigned weights[2];
        PackWeights(weight, weights);
        MultiplyValues<kDim>(tile_of(n_seen, 1) + v_lane, weights, sums.out);
      }
      __syncwarp();  // the values are done with
      ++n_seen;
      if (i + 1 < run.n) copy_values();
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float weights = sums.weights[h];
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        weights += __shfl_xor_sync(~0u, weights, offset);
      }
      if (lane < 4) shared.softmax[warp][lane * 2 + h] = {sums.highest[h], weights};
    }
    if (run.n > 0) {
      const int stage = (n_seen - 1) % kStages;
      if (lane == 0) shared.sums_stage[warp] = stage;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int head = lane % 4 * 2 + e % 2;
        if (head >= n_heads) continue;
        float* to = shared.SumsOf(warp, stage) + head * Form::kSumStride;
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
          to[OutElement<Form::kBits>(d, e / 2, lane)] = sums.out[d][e];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kVectorsOfThread; ++i) {
      const int v = i * kThreads + thread;
      if (v >= n_vectors) continue;
      Partial all = MergeWarps<Form>(shared, v);
      if (leaf % 2 == 1) all = Merge(of_one[i], all);
      if (leaf % 4 == 3) all = Merge(of_two[i], all);
      partial[i] = all;
      if (leaf % 2 == 0) of_one[i] = all;
      if (leaf % 4 == 1) of_two[i] = all;
    }
    if (leaf + 1 < kCtaLeaves) {
      __syncthreads();
      if (run.n > 0) copy_values();  // to where the sums were
    }
  }

  if (kCtas < kLeaves) LetNextKernelStart();

  // -- The tree above the CTA's leaves: four vectors to each CTA of the cluster in turn -----------
  WaitForCluster();  // all have begun, and read their queries
#pragma unroll
  for (int i = 0; i < kVectorsOfThread; ++i) {
    const int v = i * kThreads + thread;
    if (v >= n_vectors) continue;
    const int turn = v / kVectorsTogether;
    const int slot = turn / kCtas * kVectorsTogether + v % kVectorsTogether;
    StoreInCluster(AddressInCta(&shared.received[rank * kSlots + slot], turn % kCtas),
                   partial[i].sum, AddressInCta(&shared.barrier, turn % kCtas));
    // A head's threads send its softmax to each CTA once.
    for (int cta = v % kVectors; cta < kCtas; cta += kVectors) {
      StoreInCluster(AddressInCta(&shared.received_softmax[rank][v / kVectors], cta),
                     float2{partial[i].highest, partial[i].weights},
                     AddressInCta(&shared.barrier, cta));
    }
  }
  WaitForBytes(&shared.barrier);

  bf16* y = a.y + row * a.y_stride + first_head * kDim;
  for (int slot = thread; slot < kSlots; slot += kThreads) {
    const int turn = slot / kVectorsTogether * kCtas + rank;
    const int v = turn * kVectorsTogether + slot % kVectorsTogether;
    if (v >= n_vectors) continue;
    Partial of_ctas[kCtas];
#pragma unroll
    for (int c = 0; c < kCtas; ++c) {
      const float2 softmax = shared.received_softmax[c][v / kVectors];
      of_ctas[c] = {softmax.x, softmax.y, shared.received[c * kSlots + slot]};
    }
#pragma unroll
    for (int distance = 1; distance < kCtas; distance *= 2) {
#pragma unroll
      for (int c = 0; c < kCtas; c += 2 * distance) {
        of_ctas[c] = Merge(of_ctas[c], of_ctas[c + distance]);
      }
    }
    const float inverse = 1.0f / of_ctas[0].weights;
    const float4 sum = of_ctas[0].sum;
    *reinterpret_cast<uint2*>(y + v * 4) = {PackBf16(sum.x * inverse, sum.y * inverse),
                                            PackBf16(sum.z * inverse, sum.w * inverse)};
  }
}

template <typename Form, int kCtas>
absl::Status Launch(const PagedDecodeParams& params, const DecodeArguments& arguments) {
  constexpr int kShared = static_cast<int>(sizeof(typename Form::Shared));
  WALSH_RETURN_IF_ERROR((PrepareOnce<DecodeKernel<Form, kCtas>>(kShared)));
  const int64_t n_units = params.pool.shape.n_kv_heads * arguments.parts.n_parts;
  return LaunchKernel("PagedDecodeAttention", DecodeKernel<Form, kCtas>,
                      {.grid = dim3(static_cast<unsigned>(n_units * kCtas),
                                    static_cast<unsigned>(params.batch.n_sequences)),
                       .threads = kThreads,
                       .shared_bytes = kShared,
                       .cluster = kCtas,
                       .overlap_previous = params.overlap_previous,
                       .stream = params.stream},
                      arguments);
}

// CTAs of a cluster for so many clusters: as many as are at work at once, two on each
// multiprocessor.
absl::StatusOr<int> ClusterCtas(int64_t n_clusters) {
  WALSH_ASSIGN_OR_RETURN(const CurrentDevice device, GetCurrentDevice());
  int n_ctas = kLeaves;
  while (n_ctas > kCtasMin && n_clusters * n_ctas > 2 * device.n_multiprocessors) n_ctas /= 2;
  return n_ctas;
}

template <int kDim, int kBits, bool kInGroups>
absl::Status LaunchForm(const PagedDecodeParams& params, const DecodeArguments& arguments,
                        int n_ctas) {
  using Form = DecodeForm<kDim, kBits, kInGroups>;
  switch (n_ctas) {
    case 8:
      return Launch<Form, 8>(params, arguments);
    case 4:
      return Launch<Form, 4>(params, arguments);
    default:
      return Launch<Form, 2>(params, arguments);
  }
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
  WALSH_RETURN_IF_ERROR(CheckTransform(kName, params.transform, params.pool.shape));
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
  arguments.pool = static_cast<unsigned char*>(params.pool.data);
  arguments.clip = pool.form.clip;
  arguments.parts = PartsOf(arguments.attention.queries_per_key);
  arguments.transform = params.transform;
  WALSH_ASSIGN_OR_RETURN(const int n_ctas, ClusterCtas(params.batch.n_sequences * pool.n_kv_heads *
                                                       arguments.parts.n_parts));
  const auto launch_codes = [&]<int kBits>() {
    return ForQuantizedHeadDim(pool.head_dim, [&]<int kDim>() {
      // CheckKvForm's groups are at least 32 and at most half a head.
      if constexpr (kDim == 64 || kDim == 128 || kDim == 256) {
        if (arguments.attention.n_groups > 1) {
          return LaunchForm<kDim, kBits, true>(params, arguments, n_ctas);
        }
      }
      return LaunchForm<kDim, kBits, false>(params, arguments, n_ctas);
    });
  };
  switch (pool.form.bits) {
    case 8:
      return launch_codes.template operator()<8>();
    case 4:
      return launch_codes.template operator()<4>();
    default:
      return ForHeadDim(kName, pool.head_dim, [&]<int kDim>() {
        return LaunchForm<kDim, KvForm::kBf16, false>(params, arguments, n_ctas);
      });
  }
}

}  // namespace walsh::kernels::cuda
