#include "worker/tensor/mapped_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace walsh {
namespace {

bool IsMapped(void* page) {
  unsigned char residency = 0;
  return mincore(page, 1, &residency) == 0;
}

TEST(MappedMemoryTest, IsZeroAlignedAndWritableToItsEnd) {
  for (const size_t alignment : {size_t{64}, size_t{4096}, size_t{2} << 20}) {
    for (const size_t size : {size_t{1}, size_t{4096}, size_t{4097}, size_t{3} << 20}) {
      const MappedMemory memory = MappedMemory::Create(size, alignment);
      ASSERT_FALSE(memory.empty());
      ASSERT_GE(memory.size(), size);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % alignment, 0);
      EXPECT_TRUE(std::all_of(memory.data(), memory.data() + memory.size(),
                              [](uint8_t byte) { return byte == 0; }));
      memory.data()[memory.size() - 1] = 1;
    }
  }
}

TEST(MappedMemoryTest, GoesBackToTheSystem) {
  MappedMemory memory = MappedMemory::Create(1, 64);
  uint8_t* page = memory.data();
  MappedMemory moved = std::move(memory);
  EXPECT_TRUE(memory.empty());  // NOLINT(bugprone-use-after-move)
  EXPECT_EQ(moved.data(), page);
  EXPECT_TRUE(IsMapped(page));
  moved = MappedMemory();
  EXPECT_FALSE(IsMapped(page));
}

TEST(MappedMemoryTest, DiscardsWholePagesOnly) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  MappedMemory memory = MappedMemory::Create(4 * page, 64);
  std::fill_n(memory.data(), 4 * page, uint8_t{1});
  memory.Discard(page - 1, 2 * page);  // one whole page, the second, lies in it
  for (size_t i = 0; i < 4 * page; ++i) {
    ASSERT_EQ(memory.data()[i], i / page == 1 ? 0 : 1) << "byte " << i;
  }
  memory.Discard(3 * page + 1, page - 1);
  EXPECT_EQ(memory.data()[4 * page - 1], 1);
}

TEST(MappedMemoryTest, WhatTheSystemCannotGiveIsEmpty) {
  EXPECT_TRUE(MappedMemory::Create(0, 64).empty());
  EXPECT_TRUE(MappedMemory::Create(SIZE_MAX, 64).empty());
  EXPECT_TRUE(MappedMemory::Create(SIZE_MAX / 2, 2 << 20).empty());
}

}  // namespace
}  // namespace walsh
