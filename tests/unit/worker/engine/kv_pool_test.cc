#include "worker/engine/kv_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/testing/status_matchers.h"

namespace walsh::engine {
namespace {

using walsh::testing::HasCode;

// The floats of every layer, block, row and column are distinct, and all of them the pool's.
TEST(KvPoolTest, EveryRowHasAPlaceOfItsOwn) {
  constexpr int64_t kLayers = 3, kWidth = 5, kBlocks = 4;
  ASSERT_OK_AND_ASSIGN(
      KvPool pool, KvPool::Create({.n_layers = kLayers, .kv_width = kWidth, .n_blocks = kBlocks}));
  const auto visit = [&](const auto& each) {
    float number = 1;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (int64_t block = 0; block < kBlocks; ++block) {
        for (int64_t i = 0; i < kKvBlockTokens * kWidth; ++i) {
          each(pool.keys(layer)[block * pool.block_stride() + i], number++);
          each(pool.values(layer)[block * pool.block_stride() + i], number++);
        }
      }
    }
    EXPECT_EQ(static_cast<int64_t>(number - 1) * 4,
              KvPool::BytesPerToken(kLayers, kWidth) * kKvBlockTokens * kBlocks);
  };
  visit([](float& value, float number) { value = number; });
  visit([](float& value, float number) { EXPECT_EQ(value, number); });
}

TEST(KvPoolTest, DiscardedBlocksTakeNoMemoryAndOthersStay) {
  const int64_t page_floats = sysconf(_SC_PAGESIZE) / static_cast<int64_t>(sizeof(float));
  ASSERT_OK_AND_ASSIGN(KvPool pool,
                       KvPool::Create({.n_layers = 1, .kv_width = page_floats, .n_blocks = 3}));
  const auto is_resident = [&](int64_t block) {
    unsigned char page = 0;
    EXPECT_EQ(mincore(pool.keys(0) + block * pool.block_stride(), 1, &page), 0);
    return (page & 1) != 0;
  };
  EXPECT_FALSE(is_resident(1));
  for (int64_t block = 0; block < 3; ++block) {
    for (int64_t i = 0; i < pool.block_stride(); ++i) {
      pool.keys(0)[block * pool.block_stride() + i] = 1;
    }
  }
  pool.Discard(1);
  EXPECT_TRUE(is_resident(0));
  EXPECT_FALSE(is_resident(1));
  EXPECT_TRUE(is_resident(2));
  EXPECT_EQ(pool.keys(0)[pool.block_stride() - 1], 1);
  EXPECT_EQ(pool.keys(0)[pool.block_stride()], 0);
  EXPECT_EQ(pool.keys(0)[2 * pool.block_stride()], 1);
}

TEST(KvPoolTest, MemoryThatIsNotThereIsAnError) {
  EXPECT_THAT(
      KvPool::Create({.n_layers = 1 << 10, .kv_width = 1 << 20, .n_blocks = 1 << 20}).status(),
      HasCode(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace walsh::engine
