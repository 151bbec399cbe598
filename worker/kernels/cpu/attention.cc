// Attention without the matrix of scores, in the manner of FlashAttention and Flash-Decoding.
//
// Keys are cut into chunks of 256 at absolute positions. The query heads that share a KV head,
// times a few neighbouring queries, form a block of rows that meets a chunk at a time: scores,
// their softmax within the chunk, the weighted sum of values, then a merge with what came before.
// With few queries the chunks of one block run in parallel and are merged at the end.
//
// A row's arithmetic does not depend on the rows around it nor on how its tiles were cut: a token
// decoded alone, in a batch or within a prompt gets the same bits.
//
// Source:  Dao et al. (arXiv 2205.14135); Flash-Decoding (2023) for the split of keys.
// Bound:   decoding reads each key and value once; a prompt is bound by arithmetic.
#include <cmath>
#include <limits>
#include <span>
#include <vector>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

#ifndef WALSH_KERNELS_CPU_ATTENTION_TYPES
#define WALSH_KERNELS_CPU_ATTENTION_TYPES
namespace walsh::kernels::cpu {

constexpr int64_t kChunkKeys = 256;
constexpr int64_t kBlockKeys = 64;  // keys that are transposed at a time
constexpr int64_t kBlockRows = 32;  // query heads × queries of a block, unless one KV head has more

// The rows of a block: query first_query + row / heads_per_kv, head row % heads_per_kv of the
// group.
struct RowBlock {
  const AttentionParams* params = nullptr;
  int64_t kv_head = 0;
  int64_t first_query = 0;
  int64_t n_queries = 0;

  int64_t heads_per_kv() const { return params->n_heads / params->n_kv_heads; }
  int64_t n_rows() const { return n_queries * heads_per_kv(); }
  int64_t n_keys() const { return params->n_past + first_query + n_queries; }
  int64_t n_chunks() const { return CeilDiv(n_keys(), kChunkKeys); }
  int64_t query(int64_t row) const { return first_query + row / heads_per_kv(); }
  int64_t head(int64_t row) const { return kv_head * heads_per_kv() + row % heads_per_kv(); }
};

// Softmax-weighted sums of values over some keys, not yet divided by the sum of weights.
struct Partial {
  float* sums = nullptr;     // [n_rows, head_dim]
  float* highest = nullptr;  // [n_rows] largest score
  float* weight = nullptr;   // [n_rows] sum of exp(score − highest); 0: the row saw no key
};

struct AttentionScratch {
  AttentionScratch(int64_t n_rows, int64_t head_dim)
      : queries(static_cast<size_t>(n_rows * head_dim)),
        keys(static_cast<size_t>(head_dim * kBlockKeys)),
        scores(static_cast<size_t>(n_rows * kChunkKeys)) {}
  std::vector<float> queries;  // [n_rows, head_dim], scaled
  std::vector<float> keys;     // [head_dim, kBlockKeys]
  std::vector<float> scores;   // [n_rows, kChunkKeys]
};

}  // namespace walsh::kernels::cpu
#endif  // WALSH_KERNELS_CPU_ATTENTION_TYPES

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// to[d, key] = from[key, d] for a block of keys; absent keys become zeros.
void TransposeKeys(const float* from, int64_t stride, int64_t n_keys, int64_t head_dim, float* to) {
  int64_t key = 0;
#if HWY_TARGET != HWY_SCALAR
  {
    const hn::CappedTag<float, 4> four;
    for (; key + 4 <= n_keys; key += 4) {
      const float* k = from + key * stride;
      int64_t d = 0;
      for (; d + 4 <= head_dim; d += 4) {
        const auto k0 = hn::LoadU(four, k + d);
        const auto k1 = hn::LoadU(four, k + stride + d);
        const auto k2 = hn::LoadU(four, k + 2 * stride + d);
        const auto k3 = hn::LoadU(four, k + 3 * stride + d);
        const auto low02 = hn::InterleaveLower(four, k0, k2);
        const auto low13 = hn::InterleaveLower(four, k1, k3);
        const auto high02 = hn::InterleaveUpper(four, k0, k2);
        const auto high13 = hn::InterleaveUpper(four, k1, k3);
        float* out = to + d * kBlockKeys + key;
        hn::StoreU(hn::InterleaveLower(four, low02, low13), four, out);
        hn::StoreU(hn::InterleaveUpper(four, low02, low13), four, out + kBlockKeys);
        hn::StoreU(hn::InterleaveLower(four, high02, high13), four, out + 2 * kBlockKeys);
        hn::StoreU(hn::InterleaveUpper(four, high02, high13), four, out + 3 * kBlockKeys);
      }
      for (; d < head_dim; ++d) {
        for (int64_t i = 0; i < 4; ++i) to[d * kBlockKeys + key + i] = k[i * stride + d];
      }
    }
  }
#endif
  for (; key < kBlockKeys; ++key) {
    for (int64_t d = 0; d < head_dim; ++d) {
      to[d * kBlockKeys + key] = key < n_keys ? from[key * stride + d] : 0.0f;
    }
  }
}

// out[row, column] = Σ_i a[row, i] · b[i, column] for kRows rows and two vectors of columns, i
// ascending in each sum.
template <int kRows, class D>
HWY_INLINE void ProductTile(D d, const float* HWY_RESTRICT a, int64_t a_stride,
                            const float* HWY_RESTRICT b, int64_t b_stride, int64_t n,
                            float* HWY_RESTRICT out, int64_t out_stride) {
  using V = hn::Vec<D>;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  V low[kRows];
  V high[kRows];
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = hn::Zero(d);
  for (int64_t i = 0; i < n; ++i) {
    const V b0 = hn::LoadU(d, b + i * b_stride);
    const V b1 = hn::LoadU(d, b + i * b_stride + lanes);
    for (int r = 0; r < kRows; ++r) {
      const V factor = hn::Set(d, a[r * a_stride + i]);
      low[r] = hn::MulAdd(factor, b0, low[r]);
      high[r] = hn::MulAdd(factor, b1, high[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(low[r], d, out + r * out_stride);
    hn::StoreU(high[r], d, out + r * out_stride + lanes);
  }
}

template <int kRows>
void ProductRows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n,
                 int64_t n_cols, float* out, int64_t out_stride) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 4> four;
  const hn::CappedTag<float, 1> one;
  const auto step = 2 * static_cast<int64_t>(hn::Lanes(d));
  const auto small_step = 2 * static_cast<int64_t>(hn::Lanes(four));
  int64_t c = 0;
  for (; c + step <= n_cols; c += step) {
    ProductTile<kRows>(d, a, a_stride, b + c, b_stride, n, out + c, out_stride);
  }
  for (; c + small_step <= n_cols; c += small_step) {
    ProductTile<kRows>(four, a, a_stride, b + c, b_stride, n, out + c, out_stride);
  }
  for (; c + 2 <= n_cols; c += 2) {
    ProductTile<kRows>(one, a, a_stride, b + c, b_stride, n, out + c, out_stride);
  }
  if (c < n_cols) {  // one column is left
    for (int r = 0; r < kRows; ++r) {
      auto sum = hn::Zero(one);
      for (int64_t i = 0; i < n; ++i) {
        sum = hn::MulAdd(hn::Set(one, a[r * a_stride + i]), hn::LoadU(one, b + i * b_stride + c),
                         sum);
      }
      hn::StoreU(sum, one, out + r * out_stride + c);
    }
  }
}

// out[n_rows, n_cols] = a[n_rows, n] · b[n, n_cols]
void Product(const float* a, int64_t a_stride, int64_t n_rows, const float* b, int64_t b_stride,
             int64_t n, int64_t n_cols, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    ProductRows<4>(a + r * a_stride, a_stride, b, b_stride, n, n_cols, out + r * out_stride,
                   out_stride);
  }
  const float* rest = a + r * a_stride;
  float* rest_out = out + r * out_stride;
  switch (n_rows - r) {
    case 3:
      ProductRows<3>(rest, a_stride, b, b_stride, n, n_cols, rest_out, out_stride);
      break;
    case 2:
      ProductRows<2>(rest, a_stride, b, b_stride, n, n_cols, rest_out, out_stride);
      break;
    case 1:
      ProductRows<1>(rest, a_stride, b, b_stride, n, n_cols, rest_out, out_stride);
      break;
    default:
      break;
  }
}

// Scores of the first `n_visible` keys become exp(score − highest), those up to n_keys 0.
void Softmax(float* scores, int64_t n_visible, int64_t n_keys, float* highest, float* weight) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t end = CeilDiv(n_visible, lanes) * lanes;  // at most kChunkKeys
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

void LoadQueries(const RowBlock& block, AttentionScratch& scratch) {
  const AttentionParams& p = *block.params;
  for (int64_t row = 0; row < block.n_rows(); ++row) {
    const float* q = p.q + block.query(row) * p.q_stride + block.head(row) * p.head_dim;
    float* out = scratch.queries.data() + row * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] = q[d] * p.scale;
  }
}

void AttendToChunk(const RowBlock& block, int64_t chunk, AttentionScratch& scratch,
                   const Partial& out) {
  const AttentionParams& p = *block.params;
  const int64_t first_key = chunk * kChunkKeys;
  const int64_t n_keys = std::min(kChunkKeys, block.n_keys() - first_key);
  const int64_t n_rows = block.n_rows();
  float* scores = scratch.scores.data();
  for (int64_t key = 0; key < n_keys; key += kBlockKeys) {
    const float* k = p.k + (first_key + key) * p.kv_stride + block.kv_head * p.head_dim;
    TransposeKeys(k, p.kv_stride, std::min(kBlockKeys, n_keys - key), p.head_dim,
                  scratch.keys.data());
    Product(scratch.queries.data(), p.head_dim, n_rows, scratch.keys.data(), kBlockKeys, p.head_dim,
            kBlockKeys, scores + key, kChunkKeys);
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t n_visible = p.n_past + block.query(row) + 1 - first_key;
    float* row_scores = scores + row * kChunkKeys;
    if (n_visible <= 0) {
      for (int64_t i = 0; i < n_keys; ++i) row_scores[i] = 0.0f;
      out.highest[row] = -std::numeric_limits<float>::infinity();
      out.weight[row] = 0.0f;
      continue;
    }
    Softmax(row_scores, std::min(n_visible, n_keys), n_keys, out.highest + row, out.weight + row);
  }
  Product(scores, kChunkKeys, n_rows, p.v + first_key * p.kv_stride + block.kv_head * p.head_dim,
          p.kv_stride, n_keys, p.head_dim, out.sums, p.head_dim);
}

// total += part, both brought to the larger of their highest scores.
void Merge(const Partial& part, int64_t n_rows, int64_t head_dim, const Partial& total) {
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

void StoreBlock(const RowBlock& block, const Partial& total) {
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
namespace {

HWY_EXPORT(LoadQueries);
HWY_EXPORT(AttendToChunk);
HWY_EXPORT(Merge);
HWY_EXPORT(StoreBlock);

// Fewer blocks than this cannot keep a machine's threads busy, so their chunks become tiles too.
constexpr int64_t kBlocksMin = 32;

// Partials of one block for `n_chunks` chunks.
class Partials {
 public:
  Partials(int64_t n_chunks, int64_t n_rows, int64_t head_dim)
      : n_rows_(n_rows),
        head_dim_(head_dim),
        values_(static_cast<size_t>(n_chunks * n_rows * (head_dim + 2))) {}
  Partial operator[](int64_t chunk) {
    float* sums = values_.data() + chunk * n_rows_ * (head_dim_ + 2);
    float* highest = sums + n_rows_ * head_dim_;
    return {sums, highest, highest + n_rows_};
  }

 private:
  int64_t n_rows_;
  int64_t head_dim_;
  std::vector<float> values_;
};

std::vector<RowBlock> CutRows(std::span<const AttentionParams> sequences) {
  std::vector<RowBlock> blocks;
  for (const AttentionParams& p : sequences) {
    const int64_t step = std::max<int64_t>(1, kBlockRows / (p.n_heads / p.n_kv_heads));
    // The last queries see most keys: they go first, so that no thread is left alone with them.
    for (int64_t i = CeilDiv(p.n_new, step) - 1; i >= 0; --i) {
      for (int64_t head = 0; head < p.n_kv_heads; ++head) {
        blocks.push_back({&p, head, i * step, std::min(step, p.n_new - i * step)});
      }
    }
  }
  return blocks;
}

void AttendWhole(const RowBlock& block) {
  const int64_t head_dim = block.params->head_dim;
  AttentionScratch scratch(block.n_rows(), head_dim);
  HWY_DYNAMIC_DISPATCH(LoadQueries)(block, scratch);
  Partials partials(2, block.n_rows(), head_dim);
  const Partial total = partials[0];
  HWY_DYNAMIC_DISPATCH(AttendToChunk)(block, 0, scratch, total);
  for (int64_t chunk = 1; chunk < block.n_chunks(); ++chunk) {
    HWY_DYNAMIC_DISPATCH(AttendToChunk)(block, chunk, scratch, partials[1]);
    HWY_DYNAMIC_DISPATCH(Merge)(partials[1], block.n_rows(), head_dim, total);
  }
  HWY_DYNAMIC_DISPATCH(StoreBlock)(block, total);
}

void AttendSplit(std::span<const RowBlock> blocks, const Stream& stream) {
  std::vector<Partials> partials;
  std::vector<int64_t> first_tile{0};
  for (const RowBlock& block : blocks) {
    partials.emplace_back(block.n_chunks(), block.n_rows(), block.params->head_dim);
    first_tile.push_back(first_tile.back() + block.n_chunks());
  }
  ForEachTile(stream, first_tile.back(), [&](int64_t tile) {
    const auto after = std::upper_bound(first_tile.begin(), first_tile.end(), tile);
    const auto i = static_cast<size_t>(after - first_tile.begin() - 1);
    const RowBlock& block = blocks[i];
    const int64_t chunk = tile - first_tile[i];
    AttentionScratch scratch(block.n_rows(), block.params->head_dim);
    HWY_DYNAMIC_DISPATCH(LoadQueries)(block, scratch);
    HWY_DYNAMIC_DISPATCH(AttendToChunk)(block, chunk, scratch, partials[i][chunk]);
  });
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Partial total = partials[i][0];
    for (int64_t chunk = 1; chunk < blocks[i].n_chunks(); ++chunk) {
      HWY_DYNAMIC_DISPATCH(Merge)
      (partials[i][chunk], blocks[i].n_rows(), blocks[i].params->head_dim, total);
    }
    HWY_DYNAMIC_DISPATCH(StoreBlock)(blocks[i], total);
  }
}

}  // namespace

absl::Status AttentionBatch(std::span<const AttentionParams> sequences, const Stream& stream) {
  const std::vector<RowBlock> blocks = CutRows(sequences);
  if (static_cast<int64_t>(blocks.size()) < kBlocksMin) {
    AttendSplit(blocks, stream);
  } else {
    ForEachTile(stream, static_cast<int64_t>(blocks.size()),
                [&](int64_t i) { AttendWhole(blocks[static_cast<size_t>(i)]); });
  }
  return absl::OkStatus();
}

absl::Status Attention(const AttentionParams& p, const Stream& stream) {
  return cpu::AttentionBatch({&p, 1}, stream);
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
