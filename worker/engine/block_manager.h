// Which blocks of the KV cache are held by whom, and which hold a prefix that others may use.
//
// The cache is cut into blocks of kKvBlockTokens tokens; a sequence has a table of them. A block is
//   free     nobody's, and holds nothing;
//   used     held by one sequence that writes it, or by any number that read it;
//   cached   held by none, but full and findable by its content.
//
// Content  A full block that was published is known by the content before it and its own tokens.
//          Contents are numbered as they come and never twice, and finding one compares all tokens:
//          whatever hashes collide, two sequences share a block only if all their tokens up to its
//          end are equal, and their salts. What is published is never written again.
// Order    Allocation takes a free block, else evicts the cached one that was released longest ago.
//          A table is released from its end, so that a prefix outlives what continues it.
//
// Cost:    O(1) for each block of a call
// Threads: none; the caller locks
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "worker/kernels/params.h"

namespace walsh::engine {

using BlockId = int32_t;
using kernels::kKvBlockTokens;

// Blocks that hold `n_tokens` tokens.
constexpr int64_t KvBlocks(int64_t n_tokens) {
  return (n_tokens + kKvBlockTokens - 1) / kKvBlockTokens;
}

class BlockManager {
 public:
  // What a block and all before it hold; kStart: nothing, where a text begins.
  using Content = uint64_t;
  static constexpr Content kStart = 0;
  // Where the texts of a salt begin; kStart for an empty one. Nothing that follows one is found
  // after another. A salt is remembered for good: there are few, of tenants.
  Content StartOf(const std::string& salt);
  using Tokens = std::span<const int32_t, kKvBlockTokens>;

  struct Key {
    Content before = kStart;
    std::array<int32_t, kKvBlockTokens> tokens = {};
    bool operator==(const Key&) const = default;
  };
  static size_t HashKey(const Key& key);

  struct Options {
    int64_t n_blocks = 0;
    bool has_prefix_cache = true;              // false: nothing is ever found
    size_t (*hash)(const Key& key) = HashKey;  // a worse one in tests
  };
  explicit BlockManager(const Options& options);

  // A block that the caller alone holds, to be written; none when all are used.
  std::optional<BlockId> Allocate();
  // The published block that holds `tokens` after `before`, with the caller as one more holder.
  std::optional<BlockId> Find(Content before, Tokens tokens);
  // Makes a full block findable, which the caller alone holds. If its content is there already, the
  // caller gives the block up and holds that one in its place. Returns the one that it now holds.
  BlockId Publish(BlockId block, Content before, Tokens tokens);
  // One holder of each less; `table` in the order of its tokens.
  void Release(std::span<const BlockId> table);

  // Of a published block; kStart without a prefix cache.
  Content content(BlockId block) const { return At(block).content; }
  int n_holders(BlockId block) const { return At(block).n_holders; }
  // Blocks that became free since the last call and still are: what they hold is lost, and their
  // memory may go until they are allocated again.
  std::vector<BlockId> TakeUnused();

  int64_t n_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t n_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t n_cached() const { return n_cached_; }
  int64_t n_used() const { return n_blocks() - n_free() - n_cached(); }
  // What Allocate can give.
  int64_t n_available() const { return n_free() + n_cached(); }

 private:
  static constexpr BlockId kNone = -1;
  struct Block {
    int n_holders = 0;
    Content content = kStart;  // kStart: not published
    Key key = {};              // of a published block
    bool is_written = false;   // perhaps, since its memory last went
    BlockId older = kNone;     // among the cached ones
    BlockId newer = kNone;
  };

  const Block& At(BlockId block) const { return blocks_[static_cast<size_t>(block)]; }
  Block& At(BlockId block) { return blocks_[static_cast<size_t>(block)]; }
  void ReleaseOne(BlockId block);
  void EvictOldest();
  void AppendToCached(BlockId block);
  void RemoveFromCached(BlockId block);

  const bool has_prefix_cache_;
  std::vector<Block> blocks_;
  // The one that was released last is taken first: it is the likeliest to have memory.
  std::vector<BlockId> free_;
  std::vector<BlockId> unused_;  // for TakeUnused; may name some twice or that are not free
  absl::flat_hash_map<Key, BlockId, size_t (*)(const Key&)> published_;
  BlockId oldest_ = kNone;
  BlockId newest_ = kNone;
  int64_t n_cached_ = 0;
  Content last_content_ = kStart;
  absl::flat_hash_map<std::string, Content> starts_;  // by salt
};

}  // namespace walsh::engine
