// Attention without the matrix of scores, in the manner of FlashAttention and Flash-Decoding.
//
// Keys are cut into chunks of 128 at absolute positions. The query heads that share a KV head,
// times a few neighbouring queries, form a block of rows that meets a chunk at a time: scores,
// their softmax within the chunk, the weighted sum of values, then a merge with what came before.
// With few queries the chunks are the tiles and are merged at the end.
//
// A row's arithmetic does not depend on the rows around it nor on how its tiles were cut: a token
// decoded alone, in a batch or within a prompt gets the same bits. (Chunks before its window, which
// other rows of its block may see, add nothing to it.)
//
// Source:  Dao et al. (arXiv 2205.14135); Flash-Decoding (2023) for the split of keys.
// Bound:   decoding reads each key and value once; a prompt is bound by arithmetic.
#include <array>
#include <span>
#include <vector>

#include "worker/kernels/cpu/attention_blocks.h"
#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels::cpu {
namespace {

// With fewer blocks than this, tiles are chunks of keys instead of blocks of rows.
constexpr int64_t kBlocksMin = 32;
// Enough for a machine's threads; fewer chunks than this are cut further, by KV heads.
constexpr int64_t kSplitTilesMin = 8;
// Transposed keys of a group stay within the first-level cache.
constexpr int64_t kGroupWidthMax = 256;

AttentionScratch& ThreadScratch(const HeadGroup& group) {
  thread_local AttentionScratch scratch;
  scratch.Reserve(group);
  return scratch;
}

// Room for one Partial of a block.
int64_t PartialFloats(const RowBlock& block) {
  return block.n_rows() * (block.params->head_dim + 2);
}

Partial PartialAt(const RowBlock& block, float* data) {
  float* highest = data + block.n_rows() * block.params->head_dim;
  return {data, highest, highest + block.n_rows()};
}

// Blocks of the same queries follow one another, head by head.
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
  const HeadGroup group{&block, 1};
  AttentionScratch& scratch = ThreadScratch(group);
  LoadQueries(group, scratch);
  std::vector<float> data(static_cast<size_t>(2 * PartialFloats(block)));
  const Partial total = PartialAt(block, data.data());
  const Partial part = PartialAt(block, data.data() + PartialFloats(block));
  AttendToChunk(group, block.first_chunk(), scratch, &total);
  for (int64_t chunk = block.first_chunk() + 1; chunk < block.end_chunk(); ++chunk) {
    AttendToChunk(group, chunk, scratch, &part);
    Merge(part, block.n_rows(), block.params->head_dim, total);
  }
  StoreBlock(block, total);
}

struct SplitTile {
  HeadGroup group;
  int64_t chunk = 0;
};

std::vector<SplitTile> CutChunks(std::span<const RowBlock> blocks) {
  int64_t n_chunks = 0;
  for (const RowBlock& block : blocks) n_chunks += block.kv_head == 0 ? block.n_chunks() : 0;
  const int64_t parts = CeilDiv(kSplitTilesMin, std::max<int64_t>(1, n_chunks));
  std::vector<SplitTile> tiles;
  for (size_t first = 0; first < blocks.size();) {
    const AttentionParams& p = *blocks[first].params;
    const int64_t step =
        std::clamp<int64_t>(kGroupWidthMax / p.head_dim, 1, CeilDiv(p.n_kv_heads, parts));
    for (int64_t chunk = blocks[first].first_chunk(); chunk < blocks[first].end_chunk(); ++chunk) {
      for (int64_t head = 0; head < p.n_kv_heads; head += step) {
        tiles.push_back({{&blocks[first + head], std::min(step, p.n_kv_heads - head)}, chunk});
      }
    }
    first += static_cast<size_t>(p.n_kv_heads);
  }
  return tiles;
}

void AttendSplit(std::span<const RowBlock> blocks, const Stream& stream) {
  std::vector<float*> first_partial;
  int64_t n_floats = 0;
  for (const RowBlock& block : blocks) n_floats += block.n_chunks() * PartialFloats(block);
  std::vector<float> data(static_cast<size_t>(n_floats));
  float* next = data.data();
  for (const RowBlock& block : blocks) {
    first_partial.push_back(next);
    next += block.n_chunks() * PartialFloats(block);
  }
  const auto partial = [&](size_t i, int64_t chunk) {
    const int64_t index = chunk - blocks[i].first_chunk();
    return PartialAt(blocks[i], first_partial[i] + index * PartialFloats(blocks[i]));
  };
  const std::vector<SplitTile> tiles = CutChunks(blocks);
  ForEachTile(stream, static_cast<int64_t>(tiles.size()), [&](int64_t t) {
    const auto& [group, chunk] = tiles[static_cast<size_t>(t)];
    std::array<Partial, kGroupWidthMax> out;
    for (int64_t i = 0; i < group.n_blocks; ++i) {
      out[static_cast<size_t>(i)] =
          partial(static_cast<size_t>(group.blocks - blocks.data() + i), chunk);
    }
    AttentionScratch& scratch = ThreadScratch(group);
    LoadQueries(group, scratch);
    AttendToChunk(group, chunk, scratch, out.data());
  });
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Partial total = partial(i, blocks[i].first_chunk());
    for (int64_t chunk = blocks[i].first_chunk() + 1; chunk < blocks[i].end_chunk(); ++chunk) {
      Merge(partial(i, chunk), blocks[i].n_rows(), blocks[i].params->head_dim, total);
    }
    StoreBlock(blocks[i], total);
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
