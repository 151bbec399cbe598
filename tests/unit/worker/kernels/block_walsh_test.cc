#include <gtest/gtest.h>

#include <cmath>

#include "tests/unit/worker/kernels/kernel_harness.h"

namespace walsh::kernels {
namespace {

using testing::RandomFloats;

TEST(BlockWalshTest, LikeReference) {
  for (int64_t block = 1; block <= 2048; block *= 2) {
    for (const bool sequency : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "block " << block << " sequency " << sequency);
      const int64_t cols = block * 3;
      const int64_t stride = cols + 5;
      ExpectLikeReference(RandomFloats(4 * stride, 1),
                          [&](const Stream& stream, float* x) {
                            return BlockWalsh({.rows = 4,
                                               .cols = cols,
                                               .block = block,
                                               .sequency = sequency,
                                               .x = x,
                                               .x_stride = stride},
                                              stream);
                          },
                          {.max_abs = 1e-5, .max_rel = 1e-4, .nmse = 1e-12});
    }
  }
}

// Row s of the Walsh matrix, which the transform of unit vector s writes, has s sign changes.
TEST(BlockWalshTest, RowHasItsSequency) {
  for (int64_t block = 2; block <= 1024; block *= 2) {
    for (int64_t s = 0; s < block; ++s) {
      std::vector<float> x(static_cast<size_t>(block), 0.0f);
      x[static_cast<size_t>(s)] = 1.0f;
      ASSERT_OK(BlockWalsh(
          {.rows = 1, .cols = block, .block = block, .x = x.data(), .x_stride = block}, {}));
      int64_t changes = 0;
      for (size_t i = 1; i < x.size(); ++i) changes += (x[i] > 0) != (x[i - 1] > 0);
      ASSERT_EQ(changes, s) << "block " << block;
    }
  }
}

TEST(BlockWalshTest, NaturalOrderOfEight) {
  const std::vector<int> expected = {0, 7, 3, 4, 1, 6, 2, 5};
  for (size_t row = 0; row < 8; ++row) {
    std::vector<float> x(8, 0.0f);
    x[row] = 1.0f;
    ASSERT_OK(BlockWalsh(
        {.rows = 1, .cols = 8, .block = 8, .sequency = false, .x = x.data(), .x_stride = 8}, {}));
    int changes = 0;
    for (size_t i = 1; i < x.size(); ++i) changes += (x[i] > 0) != (x[i - 1] > 0);
    EXPECT_EQ(changes, expected[row]);
  }
}

TEST(BlockWalshTest, TwiceIsTheIdentity) {
  const auto original = RandomFloats(7 * 576, 1);
  for (const bool sequency : {false, true}) {
    std::vector<float> x = original;
    for (int i = 0; i < 2; ++i) {
      ASSERT_OK(BlockWalsh({.rows = 7,
                            .cols = 576,
                            .block = 64,
                            .sequency = sequency,
                            .x = x.data(),
                            .x_stride = 576},
                           {}));
    }
    EXPECT_THAT(
        testing::CompareTensors(x, original, {.max_abs = 1e-5, .max_rel = 1e-5, .nmse = 1e-12}),
        testing::IsClose());
  }
}

}  // namespace
}  // namespace walsh::kernels
