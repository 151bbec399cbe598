// What attention's driver and its vector kernels share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/params.h"

namespace walsh::kernels::cpu {

inline constexpr int64_t kChunkKeys = 128;
inline constexpr int64_t kBlockKeys = 32;  // keys that are transposed at a time
inline constexpr int64_t kValueKeys = 16;  // keys after which heads of a group take turns
static_assert(kChunkKeys % kKvBlockTokens == 0, "a chunk begins with a block of a paged cache");
static_assert(kValueKeys == kKvBlockTokens, "values that are multiplied at a time lie together");
inline constexpr int64_t kBlockRows =
    32;  // query heads × queries of a block, unless one KV head has more

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
  // Chunks [first_chunk, end_chunk) hold all keys that some row sees.
  int64_t first_chunk() const { return first_key(first_query) / kChunkKeys; }
  int64_t end_chunk() const { return CeilDiv(n_keys(), kChunkKeys); }
  int64_t n_chunks() const { return end_chunk() - first_chunk(); }
  // The first key that query `query` sees.
  int64_t first_key(int64_t query) const {
    if (params->window == 0) return 0;
    return std::max<int64_t>(0, params->n_past + query + 1 - params->window);
  }
  int64_t query(int64_t row) const { return first_query + row / heads_per_kv(); }
  int64_t head(int64_t row) const { return kv_head * heads_per_kv() + row % heads_per_kv(); }
};

// Softmax-weighted sums of values over some keys, not yet divided by the sum of weights.
struct Partial {
  float* sums = nullptr;     // [n_rows, head_dim]
  float* highest = nullptr;  // [n_rows] largest score
  float* weight = nullptr;   // [n_rows] sum of exp(score − highest); 0: the row saw no key
};

// Neighbouring heads of the same queries, which one tile takes together: in a row of keys or values
// they lie beside one another, and memory is then read in its order.
struct HeadGroup {
  const RowBlock* blocks = nullptr;
  int64_t n_blocks = 0;
};

// Buffers of one thread, which grow and stay.
struct AttentionScratch {
  void Reserve(const HeadGroup& group) {
    const int64_t n_rows = group.n_blocks * group.blocks->n_rows();
    const int64_t head_dim = group.blocks->params->head_dim;
    Grow(queries, n_rows * head_dim);
    Grow(keys, group.n_blocks * head_dim * kBlockKeys);
    Grow(scores, n_rows * kChunkKeys);
  }
  std::vector<float> queries;  // [n_blocks, n_rows, head_dim], scaled
  std::vector<float> keys;     // [n_blocks, head_dim, kBlockKeys]
  std::vector<float> scores;   // [n_blocks, n_rows, kChunkKeys]

 private:
  static void Grow(std::vector<float>& buffer, int64_t n) {
    if (buffer.size() < static_cast<size_t>(n)) buffer.resize(static_cast<size_t>(n));
  }
};

// The group's queries, scaled, into the scratch.
void LoadQueries(const HeadGroup& group, AttentionScratch& scratch);
// All rows of the group against one chunk; `out` has one Partial for each block.
void AttendToChunk(const HeadGroup& group, int64_t chunk, AttentionScratch& scratch,
                   const Partial* out);
// total += part, both brought to the larger of their highest scores.
void Merge(const Partial& part, int64_t n_rows, int64_t head_dim, const Partial& total);
// Divides by the sums of weights and writes the block's outputs.
void StoreBlock(const RowBlock& block, const Partial& total);

}  // namespace walsh::kernels::cpu
