#include "worker/engine/block_manager.h"

#include <algorithm>
#include <utility>

#include "absl/hash/hash.h"
#include "common/check.h"

namespace walsh::engine {

size_t BlockManager::HashKey(const Key& key) { return absl::HashOf(key.before, key.tokens); }

BlockManager::BlockManager(const Options& options)
    : has_prefix_cache_(options.has_prefix_cache),
      blocks_(static_cast<size_t>(options.n_blocks)),
      published_(0, options.hash) {
  // The first blocks are taken first, so that memory is touched from its beginning.
  free_.reserve(blocks_.size());
  for (int64_t i = options.n_blocks - 1; i >= 0; --i) free_.push_back(static_cast<BlockId>(i));
}

BlockManager::Content BlockManager::StartOf(const std::string& salt) {
  if (salt.empty()) return kStart;
  const auto [start, is_new] = starts_.try_emplace(salt, last_content_ + 1);
  if (is_new) ++last_content_;
  return start->second;
}

std::optional<BlockId> BlockManager::Allocate() {
  if (free_.empty() && n_cached_ > 0) EvictOldest();
  if (free_.empty()) return std::nullopt;
  const BlockId block = free_.back();
  free_.pop_back();
  At(block).n_holders = 1;
  At(block).is_written = true;
  return block;
}

std::optional<BlockId> BlockManager::Find(Content before, Tokens tokens) {
  if (!has_prefix_cache_) return std::nullopt;
  Key key{.before = before};
  std::copy(tokens.begin(), tokens.end(), key.tokens.begin());
  const auto it = published_.find(key);
  if (it == published_.end()) return std::nullopt;
  if (At(it->second).n_holders++ == 0) RemoveFromCached(it->second);
  return it->second;
}

BlockId BlockManager::Publish(BlockId block, Content before, Tokens tokens) {
  if (!has_prefix_cache_) return block;
  WALSH_CHECK_EQ(At(block).n_holders, 1);
  WALSH_CHECK_EQ(At(block).content, kStart);
  if (const auto existing = Find(before, tokens)) {
    ReleaseOne(block);
    return *existing;
  }
  Block& published = At(block);
  published.key.before = before;
  std::copy(tokens.begin(), tokens.end(), published.key.tokens.begin());
  published.content = ++last_content_;
  published_.emplace(published.key, block);
  return block;
}

void BlockManager::Release(std::span<const BlockId> table) {
  for (auto block = table.rbegin(); block != table.rend(); ++block) ReleaseOne(*block);
}

std::vector<BlockId> BlockManager::TakeUnused() {
  std::vector<BlockId> taken = std::exchange(unused_, {});
  std::erase_if(taken, [this](BlockId id) {
    Block& block = At(id);
    const bool is_free = block.n_holders == 0 && block.content == kStart;
    return !is_free || !std::exchange(block.is_written, false);
  });
  return taken;
}

void BlockManager::ReleaseOne(BlockId block) {
  WALSH_CHECK_GE(At(block).n_holders, 1);
  if (--At(block).n_holders > 0) return;
  if (At(block).content != kStart) {
    AppendToCached(block);
  } else {
    free_.push_back(block);
    unused_.push_back(block);
  }
}

void BlockManager::EvictOldest() {
  const BlockId block = oldest_;
  RemoveFromCached(block);
  published_.erase(At(block).key);
  At(block).content = kStart;
  free_.push_back(block);
}

void BlockManager::AppendToCached(BlockId block) {
  At(block).older = newest_;
  At(block).newer = kNone;
  (newest_ == kNone ? oldest_ : At(newest_).newer) = block;
  newest_ = block;
  ++n_cached_;
}

void BlockManager::RemoveFromCached(BlockId block) {
  const BlockId older = At(block).older;
  const BlockId newer = At(block).newer;
  (older == kNone ? oldest_ : At(older).newer) = newer;
  (newer == kNone ? newest_ : At(newer).older) = older;
  --n_cached_;
}

}  // namespace walsh::engine
