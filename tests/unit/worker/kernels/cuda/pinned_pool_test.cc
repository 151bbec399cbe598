#include "worker/kernels/cuda/pinned_pool.h"

#include <utility>

#include "tests/unit/worker/kernels/cuda/device_fixture.h"

namespace walsh::kernels::cuda {
namespace {

using PinnedPoolTest = DeviceTest;

TEST_F(PinnedPoolTest, HandsOutTheSmallestThatWillDo) {
  const std::byte* large = nullptr;
  const std::byte* small = nullptr;
  {
    ASSERT_OK_AND_ASSIGN(auto a, pinned_.Take(1 << 20));
    ASSERT_OK_AND_ASSIGN(auto b, pinned_.Take(1 << 16));
    EXPECT_GE(a.span().size(), size_t{1} << 20);
    large = a.span().data();
    small = b.span().data();
    EXPECT_NE(large, small);
  }
  ASSERT_OK_AND_ASSIGN(auto a, pinned_.Take(1000));
  EXPECT_EQ(a.span().data(), small);
  ASSERT_OK_AND_ASSIGN(auto b, pinned_.Take(1000));
  EXPECT_EQ(b.span().data(), large);
  ASSERT_OK_AND_ASSIGN(auto c, pinned_.Take(1000));
  EXPECT_NE(c.span().data(), small);
  EXPECT_NE(c.span().data(), large);
}

TEST_F(PinnedPoolTest, ATooSmallOneIsNotHandedOut) {
  { ASSERT_OK(pinned_.Take(1000)); }
  ASSERT_OK_AND_ASSIGN(auto a, pinned_.Take(1001));
  EXPECT_EQ(a.span().size(), 1001);
}

TEST_F(PinnedPoolTest, AMovedLeaseComesBackOnce) {
  const std::byte* memory = nullptr;
  {
    ASSERT_OK_AND_ASSIGN(auto a, pinned_.Take(1000));
    memory = a.span().data();
    PinnedPool::Lease b = std::move(a);
    PinnedPool::Lease c;
    c = std::move(b);
    EXPECT_EQ(c.span().data(), memory);
  }
  ASSERT_OK_AND_ASSIGN(auto a, pinned_.Take(1000));
  EXPECT_EQ(a.span().data(), memory);
  ASSERT_OK_AND_ASSIGN(auto b, pinned_.Take(1000));
  EXPECT_NE(b.span().data(), memory);
}

}  // namespace
}  // namespace walsh::kernels::cuda
