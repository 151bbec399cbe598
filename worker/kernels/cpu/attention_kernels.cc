// Attention's arithmetic on vectors; see attention.cc.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/attention_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

#include "worker/kernels/cpu/attention_blocks.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// to[d, key] = from[key, d] for 4 keys of one head.
void TransposeFour(const float* from, int64_t stride, int64_t head_dim, float* to) {
  int64_t d = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> four;
  for (; d + 4 <= head_dim; d += 4) {
    const auto k0 = hn::LoadU(four, from + d);
    const auto k1 = hn::LoadU(four, from + stride + d);
    const auto k2 = hn::LoadU(four, from + 2 * stride + d);
    const auto k3 = hn::LoadU(four, from + 3 * stride + d);
    const auto low02 = hn::InterleaveLower(four, k0, k2);
    const auto low13 = hn::InterleaveLower(four, k1, k3);
    const auto high02 = hn::InterleaveUpper(four, k0, k2);
    const auto high13 = hn::InterleaveUpper(four, k1, k3);
    float* out = to + d * kBlockKeys;
    hn::StoreU(hn::InterleaveLower(four, low02, low13), four, out);
    hn::StoreU(hn::InterleaveUpper(four, low02, low13), four, out + kBlockKeys);
    hn::StoreU(hn::InterleaveLower(four, high02, high13), four, out + 2 * kBlockKeys);
    hn::StoreU(hn::InterleaveUpper(four, high02, high13), four, out + 3 * kBlockKeys);
  }
#endif
  for (; d < head_dim; ++d) {
    for (int64_t i = 0; i < 4; ++i) to[d * kBlockKeys + i] = from[i * stride + d];
  }
}

// Into the second-level cache. Tried: the first level, and none at all (5 instead of 8 GB/s for one
// thread of a Zen 4 that reads 20 GB/s when it does nothing else).
void PrefetchRows(const float* rows, int64_t stride, int64_t n_rows, int64_t width) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t row = 0; row < n_rows; ++row) {
    for (int64_t i = 0; i < width; i += kLineFloats) {
      __builtin_prefetch(rows + row * stride + i, 0, 2);
    }
  }
}

// Up to kBlockKeys keys of the group's heads from `first` on, each head transposed; absent keys
// become zeros. `n_left` keys are in the chunk: the next ones are fetched meanwhile, and the values
// of these.
void TransposeKeys(const HeadGroup& group, int64_t first, int64_t n_left, float* to) {
  static_assert(kKvBlockTokens % 4 == 0, "four keys lie together");
  const RowBlock& block = *group.blocks;
  const AttentionParams& p = *block.params;
  const int64_t head = block.kv_head * p.head_dim;
  const int64_t to_head = p.head_dim * kBlockKeys;
  const int64_t n_keys = std::min(kBlockKeys, n_left);
  int64_t key = 0;
  for (; key + 4 <= n_keys; key += 4) {
    const int64_t offset = p.KvOffset(first + key) + head;
    PrefetchRows(p.v + offset, p.kv_stride, 4, group.n_blocks * p.head_dim);
    if (kBlockKeys + key + 4 <= n_left) {
      PrefetchRows(p.k + p.KvOffset(first + kBlockKeys + key) + head, p.kv_stride, 4,
                   group.n_blocks * p.head_dim);
    }
    for (int64_t i = 0; i < group.n_blocks; ++i) {
      TransposeFour(p.k + offset + i * p.head_dim, p.kv_stride, p.head_dim, to + i * to_head + key);
    }
  }
  for (; key < kBlockKeys; ++key) {
    const float* from = key < n_keys ? p.k + p.KvOffset(first + key) + head : nullptr;
    for (int64_t i = 0; i < group.n_blocks; ++i) {
      for (int64_t d = 0; d < p.head_dim; ++d) {
        to[i * to_head + d * kBlockKeys + key] = from != nullptr ? from[i * p.head_dim + d] : 0.0f;
      }
    }
  }
}

// A product's operands and its place.
struct ProductShape {
  int64_t a_stride = 0;
  int64_t b_stride = 0;
  int64_t out_stride = 0;
  int64_t n = 0;        // terms of each sum
  int64_t n_piece = 0;  // rows of b that lie together
  int64_t n_cols = 0;
  bool accumulate = false;  // the sums go on from what `out` holds
};

// out[row, column] = Σ_i a[row, i] · b[i, column] for kRows rows and kVectors vectors of columns
// from `column` on, i ascending in each sum. Row i of b is row i % n_piece of b[i / n_piece].
template <int kRows, int kVectors, class D>
HWY_INLINE void ProductTile(D d, const ProductShape& s, const float* HWY_RESTRICT a,
                            const float* const* b, int64_t column, float* HWY_RESTRICT out) {
  using V = hn::Vec<D>;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  V sums[kRows * kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r * kVectors + v] =
          s.accumulate ? hn::LoadU(d, out + r * s.out_stride + v * lanes) : hn::Zero(d);
    }
  }
  for (int64_t first = 0; first < s.n; first += s.n_piece) {
    const float* HWY_RESTRICT row = *b++ + column;
    const int64_t end = std::min(s.n, first + s.n_piece);
    for (int64_t i = first; i < end; ++i, row += s.b_stride) {
      V columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = hn::LoadU(d, row + v * lanes);
      for (int r = 0; r < kRows; ++r) {
        const V factor = hn::Set(d, a[r * s.a_stride + i]);
        for (int v = 0; v < kVectors; ++v) {
          sums[r * kVectors + v] = hn::MulAdd(factor, columns[v], sums[r * kVectors + v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(sums[r * kVectors + v], d, out + r * s.out_stride + v * lanes);
    }
  }
}

// Columns from `c` on in tiles of kVectors vectors; returns the first that is left.
template <int kRows, int kVectors, class D>
HWY_INLINE int64_t ProductColumns(D d, const ProductShape& s, const float* a, const float* const* b,
                                  float* out, int64_t c) {
  const auto step = kVectors * static_cast<int64_t>(hn::Lanes(d));
  for (; c + step <= s.n_cols; c += step) ProductTile<kRows, kVectors>(d, s, a, b, c, out + c);
  return c;
}

template <int kRows>
void ProductRows(const ProductShape& s, const float* a, const float* const* b, float* out) {
  const hn::ScalableTag<float> d;
  int64_t c = ProductColumns<kRows, 2>(d, s, a, b, out, 0);
#if HWY_TARGET != HWY_SCALAR
  c = ProductColumns<kRows, 2>(hn::CappedTag<float, 4>(), s, a, b, out, c);
#endif
  ProductColumns<kRows, 1>(hn::CappedTag<float, 1>(), s, a, b, out, c);
}

// out[n_rows, n_cols] = a[n_rows, n] · b[n, n_cols], b in pieces
void Product(const ProductShape& s, int64_t n_rows, const float* a, const float* const* b,
             float* out) {
  int64_t r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    ProductRows<4>(s, a + r * s.a_stride, b, out + r * s.out_stride);
  }
  a += r * s.a_stride;
  out += r * s.out_stride;
  if (n_rows - r == 3) return ProductRows<3>(s, a, b, out);
  if (n_rows - r == 2) return ProductRows<2>(s, a, b, out);
  if (n_rows - r == 1) return ProductRows<1>(s, a, b, out);
}

// Scores of keys [first, n_visible) become exp(score − highest), those before and up to n_keys 0.
void Softmax(float* scores, int64_t first, int64_t n_visible, int64_t n_keys, float* highest,
             float* weight) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t end = CeilDiv(n_visible, lanes) * lanes;  // at most kChunkKeys
  for (int64_t i = 0; i < first; ++i) scores[i] = -1e30f;
  for (int64_t i = n_visible; i < std::max(end, n_keys); ++i) scores[i] = -1e30f;
  auto max = hn::Set(d, -1e30f);
  for (int64_t i = 0; i < end; i += lanes) max = hn::Max(max, hn::LoadU(d, scores + i));
  max = hn::MaxOfLanes(d, max);
  auto sum = hn::Zero(d);
  for (int64_t i = 0; i < end; i += lanes) {
    const auto power = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + i), max));
    hn::StoreU(power, d, scores + i);
    sum = hn::Add(sum, power);
  }
  for (int64_t i = end; i < n_keys; ++i) scores[i] = 0.0f;
  *highest = hn::GetLane(max);
  *weight = hn::GetLane(hn::SumOfLanes(d, sum));
}

void LoadQueriesOnVectors(const HeadGroup& group, AttentionScratch& scratch) {
  float* out = scratch.queries.data();
  for (int64_t i = 0; i < group.n_blocks; ++i) {
    const RowBlock& block = group.blocks[i];
    const AttentionParams& p = *block.params;
    for (int64_t row = 0; row < block.n_rows(); ++row) {
      const float* q = p.q + block.query(row) * p.q_stride + block.head(row) * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; ++d) *out++ = q[d] * p.scale;
    }
  }
}

// Scores of the group's rows with a chunk's keys.
void ScoreChunk(const HeadGroup& group, int64_t first_key, int64_t n_keys,
                AttentionScratch& scratch) {
  const RowBlock& first = *group.blocks;
  const AttentionParams& p = *first.params;
  const int64_t n_rows = first.n_rows();
  for (int64_t key = 0; key < n_keys; key += kBlockKeys) {
    TransposeKeys(group, first_key + key, n_keys - key, scratch.keys.data());
    for (int64_t i = 0; i < group.n_blocks; ++i) {
      const float* keys = scratch.keys.data() + i * p.head_dim * kBlockKeys;
      Product({.a_stride = p.head_dim,
               .b_stride = kBlockKeys,
               .out_stride = kChunkKeys,
               .n = p.head_dim,
               .n_piece = p.head_dim,
               .n_cols = kBlockKeys},
              n_rows, scratch.queries.data() + i * n_rows * p.head_dim, &keys,
              scratch.scores.data() + i * n_rows * kChunkKeys + key);
    }
  }
}

void SoftmaxRows(const RowBlock& block, int64_t first_key, int64_t n_keys, float* scores,
                 const Partial& out) {
  for (int64_t row = 0; row < block.n_rows(); ++row) {
    const int64_t n_visible =
        std::min(block.params->n_past + block.query(row) + 1 - first_key, n_keys);
    const int64_t first = std::max<int64_t>(0, block.first_key(block.query(row)) - first_key);
    float* row_scores = scores + row * kChunkKeys;
    if (first < n_visible) {
      Softmax(row_scores, first, n_visible, n_keys, out.highest + row, out.weight + row);
    } else {
      for (int64_t i = 0; i < n_keys; ++i) row_scores[i] = 0.0f;
      out.highest[row] = -std::numeric_limits<float>::infinity();
      out.weight[row] = 0.0f;
    }
  }
}

void AttendToChunkOnVectors(const HeadGroup& group, int64_t chunk, AttentionScratch& scratch,
                            const Partial* out) {
  const RowBlock& first = *group.blocks;
  const AttentionParams& p = *first.params;
  const int64_t first_key = chunk * kChunkKeys;
  const int64_t n_keys = std::min(kChunkKeys, first.n_keys() - first_key);
  const int64_t n_rows = first.n_rows();
  ScoreChunk(group, first_key, n_keys, scratch);
  for (int64_t i = 0; i < group.n_blocks; ++i) {
    SoftmaxRows(group.blocks[i], first_key, n_keys, scratch.scores.data() + i * n_rows * kChunkKeys,
                out[i]);
  }
  // Several heads take turns every few keys, so that the values, too, are read in memory's order.
  const int64_t step = group.n_blocks == 1 ? n_keys : kValueKeys;
  std::array<const float*, kChunkKeys / kValueKeys> values;
  for (int64_t key = 0; key < n_keys; key += step) {
    for (int64_t i = 0; i < group.n_blocks; ++i) {
      for (int64_t piece = 0; piece < step; piece += kValueKeys) {
        values[static_cast<size_t>(piece / kValueKeys)] =
            p.v + p.KvOffset(first_key + key + piece) + (first.kv_head + i) * p.head_dim;
      }
      Product({.a_stride = kChunkKeys,
               .b_stride = p.kv_stride,
               .out_stride = p.head_dim,
               .n = std::min(step, n_keys - key),
               .n_piece = kValueKeys,
               .n_cols = p.head_dim,
               .accumulate = key > 0},
              n_rows, scratch.scores.data() + i * n_rows * kChunkKeys + key, values.data(),
              out[i].sums);
    }
  }
}

void MergeOnVectors(const Partial& part, int64_t n_rows, int64_t head_dim, const Partial& total) {
  for (int64_t row = 0; row < n_rows; ++row) {
    if (part.weight[row] == 0.0f) continue;
    const float highest = std::max(total.highest[row], part.highest[row]);
    const float total_factor = std::exp(total.highest[row] - highest);
    const float part_factor = std::exp(part.highest[row] - highest);
    float* sums = total.sums + row * head_dim;
    const float* part_sums = part.sums + row * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
      sums[d] = sums[d] * total_factor + part_sums[d] * part_factor;
    }
    total.weight[row] = total.weight[row] * total_factor + part.weight[row] * part_factor;
    total.highest[row] = highest;
  }
}

void StoreBlockOnVectors(const RowBlock& block, const Partial& total) {
  const AttentionParams& p = *block.params;
  for (int64_t row = 0; row < block.n_rows(); ++row) {
    float* y = p.y + block.query(row) * p.y_stride + block.head(row) * p.head_dim;
    const float* sums = total.sums + row * p.head_dim;
    const float inverse = 1.0f / total.weight[row];
    for (int64_t d = 0; d < p.head_dim; ++d) y[d] = sums[d] * inverse;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(LoadQueriesOnVectors);
HWY_EXPORT(AttendToChunkOnVectors);
HWY_EXPORT(MergeOnVectors);
HWY_EXPORT(StoreBlockOnVectors);

void LoadQueries(const HeadGroup& group, AttentionScratch& scratch) {
  HWY_DYNAMIC_DISPATCH(LoadQueriesOnVectors)(group, scratch);
}

void AttendToChunk(const HeadGroup& group, int64_t chunk, AttentionScratch& scratch,
                   const Partial* out) {
  HWY_DYNAMIC_DISPATCH(AttendToChunkOnVectors)(group, chunk, scratch, out);
}

void Merge(const Partial& part, int64_t n_rows, int64_t head_dim, const Partial& total) {
  HWY_DYNAMIC_DISPATCH(MergeOnVectors)(part, n_rows, head_dim, total);
}

void StoreBlock(const RowBlock& block, const Partial& total) {
  HWY_DYNAMIC_DISPATCH(StoreBlockOnVectors)(block, total);
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
