#include "worker/engine/block_manager.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

namespace walsh::engine {
namespace {

using Content = BlockManager::Content;

std::vector<int32_t> Filled(int32_t token) { return std::vector<int32_t>(kKvBlockTokens, token); }

BlockManager::Tokens AsBlock(const std::vector<int32_t>& tokens, int64_t index = 0) {
  return BlockManager::Tokens(tokens.data() + index * kKvBlockTokens, kKvBlockTokens);
}

// A block for each of `fills`, one after another, as a sequence publishes them.
std::vector<BlockId> PublishAll(BlockManager& blocks, const std::vector<int32_t>& fills,
                                const std::string& salt = "") {
  std::vector<BlockId> table;
  Content content = blocks.StartOf(salt);
  for (const int32_t fill : fills) {
    const auto block = blocks.Allocate();
    EXPECT_TRUE(block.has_value());
    table.push_back(blocks.Publish(*block, content, AsBlock(Filled(fill))));
    content = blocks.content(table.back());
  }
  return table;
}

// How many blocks of `fills` are found; they are released again.
size_t CountFound(BlockManager& blocks, const std::vector<int32_t>& fills,
                  const std::string& salt = "") {
  std::vector<BlockId> table;
  Content content = blocks.StartOf(salt);
  for (const int32_t fill : fills) {
    const auto block = blocks.Find(content, AsBlock(Filled(fill)));
    if (!block) break;
    table.push_back(*block);
    content = blocks.content(*block);
  }
  blocks.Release(table);
  return table.size();
}

TEST(BlockManagerTest, EveryBlockIsGivenOnce) {
  BlockManager blocks({.n_blocks = 5});
  std::set<BlockId> given;
  for (int i = 0; i < 5; ++i) given.insert(blocks.Allocate().value());
  EXPECT_EQ(given, (std::set<BlockId>{0, 1, 2, 3, 4}));
  EXPECT_EQ(blocks.Allocate(), std::nullopt);
  EXPECT_EQ(blocks.n_used(), 5);
  blocks.Release(std::vector<BlockId>{3});
  EXPECT_EQ(blocks.n_free(), 1);
  EXPECT_EQ(blocks.Allocate(), 3);
}

TEST(BlockManagerTest, PublishedBlocksAreSharedAndStayWhenReleased) {
  BlockManager blocks({.n_blocks = 8});
  const std::vector<BlockId> table = PublishAll(blocks, {1, 2});
  EXPECT_EQ(blocks.Find(BlockManager::kStart, AsBlock(Filled(1))), table[0]);
  EXPECT_EQ(blocks.n_holders(table[0]), 2);
  blocks.Release(table);
  EXPECT_EQ(blocks.n_used(), 1);
  EXPECT_EQ(blocks.n_cached(), 1);
  blocks.Release(std::vector<BlockId>{table[0]});
  EXPECT_EQ(blocks.n_cached(), 2);
  EXPECT_EQ(blocks.n_free(), 6);
  EXPECT_EQ(blocks.n_available(), 8);
  EXPECT_EQ(CountFound(blocks, {1, 2, 3}), 2u);
}

TEST(BlockManagerTest, TheSameTokensOfAnotherSaltAreNotTheSame) {
  for (const auto hash :
       {BlockManager::HashKey, +[](const BlockManager::Key&) { return size_t{7}; }}) {
    BlockManager blocks({.n_blocks = 8, .hash = hash});
    const std::vector<BlockId> of_none = PublishAll(blocks, {1, 2});
    const std::vector<BlockId> of_a = PublishAll(blocks, {1, 2}, "a");
    EXPECT_EQ(CountFound(blocks, {1, 2}, "b"), 0u);
    const std::vector<BlockId> of_b = PublishAll(blocks, {1, 3}, "b");
    EXPECT_EQ(std::set<BlockId>({of_none[0], of_a[0], of_b[0]}).size(), 3u);
    EXPECT_EQ(CountFound(blocks, {1, 2}), 2u);
    EXPECT_EQ(CountFound(blocks, {1, 2}, "a"), 2u);
    EXPECT_EQ(CountFound(blocks, {1, 2}, "b"), 1u);
    EXPECT_EQ(PublishAll(blocks, {1, 2}, "a"), of_a);
  }
}

TEST(BlockManagerTest, TheSameTokensAfterOthersAreNotTheSame) {
  BlockManager blocks({.n_blocks = 8});
  const std::vector<BlockId> table = PublishAll(blocks, {1, 2, 1});
  EXPECT_NE(table[0], table[2]);
  EXPECT_EQ(CountFound(blocks, {2}), 0u);
  EXPECT_EQ(CountFound(blocks, {1, 1}), 1u);
  EXPECT_EQ(CountFound(blocks, {1, 2, 1}), 3u);
  // One token differs.
  std::vector<int32_t> tokens = Filled(1);
  tokens.back() = 2;
  EXPECT_EQ(blocks.Find(BlockManager::kStart, AsBlock(tokens)), std::nullopt);
}

// A prompt that was made so that its hashes are those of another gets none of its blocks.
TEST(BlockManagerTest, EqualHashesAreNoEquality) {
  BlockManager blocks({.n_blocks = 64, .hash = [](const BlockManager::Key&) { return size_t{7}; }});
  std::vector<int32_t> fills(64);
  std::iota(fills.begin(), fills.end(), 0);
  for (const int32_t fill : fills) blocks.Release(PublishAll(blocks, {fill}));
  EXPECT_EQ(blocks.n_cached(), 64);
  for (const int32_t fill : fills) EXPECT_EQ(CountFound(blocks, {fill}), 1u);
  EXPECT_EQ(CountFound(blocks, {64}), 0u);
  EXPECT_EQ(CountFound(blocks, {0, 1}), 1u);
}

TEST(BlockManagerTest, TheHashDependsOnWhatIsBeforeAndOnEveryToken) {
  BlockManager::Key key;
  std::set<size_t> hashes = {BlockManager::HashKey(key)};
  key.before = 1;
  hashes.insert(BlockManager::HashKey(key));
  for (int32_t& token : key.tokens) {
    token = 1;
    hashes.insert(BlockManager::HashKey(key));
  }
  EXPECT_EQ(hashes.size(), 2u + kKvBlockTokens);
}

TEST(BlockManagerTest, WhatWasUsedLastIsEvictedLastAndPrefixesOutliveWhatFollows) {
  BlockManager blocks({.n_blocks = 6});
  const std::vector<BlockId> first = PublishAll(blocks, {1, 2, 3});
  const std::vector<BlockId> second = PublishAll(blocks, {4, 5, 6});
  blocks.Release(first);
  blocks.Release(second);
  EXPECT_EQ(CountFound(blocks, {1, 2}), 2u);  // which makes them the latest
  std::vector<BlockId> evicted;
  for (int i = 0; i < 6; ++i) evicted.push_back(blocks.Allocate().value());
  EXPECT_EQ(evicted,
            (std::vector<BlockId>{first[2], second[2], second[1], second[0], first[1], first[0]}));
  EXPECT_EQ(CountFound(blocks, {1}), 0u);
  EXPECT_EQ(blocks.n_cached(), 0);
}

TEST(BlockManagerTest, FreeBlocksAreTakenBeforeCachedOnes) {
  BlockManager blocks({.n_blocks = 2});
  blocks.Release(PublishAll(blocks, {1}));
  EXPECT_TRUE(blocks.Allocate().has_value());
  EXPECT_EQ(CountFound(blocks, {1}), 1u);
}

// Two sequences with one prompt that ran side by side.
TEST(BlockManagerTest, ContentThatIsThereAlreadyTakesThePlaceOfItsCopy) {
  BlockManager blocks({.n_blocks = 4});
  const std::vector<BlockId> first = PublishAll(blocks, {1, 2});
  const std::vector<BlockId> second = PublishAll(blocks, {1, 2});
  EXPECT_EQ(first, second);
  EXPECT_EQ(blocks.n_used(), 2);
  EXPECT_EQ(blocks.n_free(), 2);
  EXPECT_EQ(blocks.n_holders(first[1]), 2);
}

TEST(BlockManagerTest, WithoutPrefixCacheNothingIsKept) {
  BlockManager blocks({.n_blocks = 4, .has_prefix_cache = false});
  const std::vector<BlockId> table = PublishAll(blocks, {1, 2});
  EXPECT_EQ(CountFound(blocks, {1}), 0u);
  blocks.Release(table);
  EXPECT_EQ(blocks.n_free(), 4);
  EXPECT_EQ(blocks.n_cached(), 0);
}

TEST(BlockManagerTest, UnusedBlocksAreNamedOnceAndOnlyWhileTheyAreFree) {
  BlockManager blocks({.n_blocks = 8});
  EXPECT_TRUE(blocks.TakeUnused().empty()) << "never written";
  const std::vector<BlockId> cached = PublishAll(blocks, {1});
  const std::vector<BlockId> others = {blocks.Allocate().value(), blocks.Allocate().value()};
  blocks.Release(cached);
  blocks.Release(others);
  blocks.Release(std::vector<BlockId>{blocks.Allocate().value()});  // free for a second time
  const BlockId taken = blocks.Allocate().value();
  const std::vector<BlockId> unused = blocks.TakeUnused();
  ASSERT_EQ(unused.size(), 1u);
  EXPECT_NE(unused[0], taken);
  EXPECT_EQ(std::count(others.begin(), others.end(), unused[0]), 1);
  EXPECT_TRUE(blocks.TakeUnused().empty());
}

// Random sequences against a record of every block's whole prefix.
TEST(BlockManagerTest, RandomUseKeepsTheRecord) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 rng(seed);
    const auto uniform = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(rng);
    };
    const int n_blocks = uniform(1, 12);
    const auto good = &BlockManager::HashKey;
    const auto bad = [](const BlockManager::Key& key) { return size_t{key.before % 2}; };
    BlockManager blocks({.n_blocks = n_blocks, .hash = seed % 2 == 0 ? good : +bad});
    struct Sequence {
      std::vector<int32_t> fills;
      std::vector<BlockId> table;
    };
    std::vector<Sequence> sequences;
    std::map<BlockId, std::vector<int32_t>> holds;  // the prefix that a block was written with
    for (int turn = 0; turn < 200; ++turn) {
      if (uniform(0, 2) == 0 && !sequences.empty()) {
        std::swap(sequences[uniform(0, static_cast<int>(sequences.size()) - 1)], sequences.back());
        blocks.Release(sequences.back().table);
        sequences.pop_back();
      } else {
        Sequence sequence;
        Content content = BlockManager::kStart;
        bool finds = true;
        for (int n = uniform(1, 4); n > 0; --n) {
          sequence.fills.push_back(uniform(0, 2));
          const std::vector<int32_t> tokens = Filled(sequence.fills.back());
          std::optional<BlockId> block;
          if (finds) block = blocks.Find(content, AsBlock(tokens));
          finds = block.has_value();
          if (!block) {
            block = blocks.Allocate();
            if (!block) break;
            holds[*block] = sequence.fills;
            block = blocks.Publish(*block, content, AsBlock(tokens));
          }
          ASSERT_EQ(holds[*block], sequence.fills);
          content = blocks.content(*block);
          sequence.table.push_back(*block);
        }
        sequences.push_back(std::move(sequence));
      }
      std::map<BlockId, int> n_holders;
      for (const Sequence& sequence : sequences) {
        for (size_t i = 0; i < sequence.table.size(); ++i) {
          ++n_holders[sequence.table[i]];
          const std::vector<int32_t> prefix(sequence.fills.begin(),
                                            sequence.fills.begin() + static_cast<int64_t>(i) + 1);
          ASSERT_EQ(holds[sequence.table[i]], prefix) << "overwritten while it was held";
        }
      }
      for (const auto& [block, n] : n_holders) ASSERT_EQ(blocks.n_holders(block), n);
      ASSERT_EQ(blocks.n_used(), static_cast<int64_t>(n_holders.size()));
      ASSERT_EQ(blocks.n_used() + blocks.n_cached() + blocks.n_free(), n_blocks);
    }
    for (const Sequence& sequence : sequences) blocks.Release(sequence.table);
    ASSERT_EQ(blocks.n_used(), 0);
  }
}

}  // namespace
}  // namespace walsh::engine
