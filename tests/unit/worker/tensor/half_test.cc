#include "worker/tensor/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace walsh {
namespace {

// Every one of the 65,536 halves survives the way through float; NaNs stay NaNs.
TEST(HalfTest, RoundTripsEveryValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToHalf(value), half) << value;
    }
  }
}

TEST(HalfTest, RoundTripsEveryBf16Value) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto bf16 = static_cast<uint16_t>(bits);
    const float value = Bf16ToFloat(bf16);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToBf16(value), bf16) << value;
    }
  }
}

// Between two neighbours: the nearer one, and at the middle the even one.
TEST(HalfTest, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const auto low = static_cast<uint16_t>(bits);
    const auto high = static_cast<uint16_t>(bits + 1);
    const double middle =
        (static_cast<double>(HalfToFloat(low)) + static_cast<double>(HalfToFloat(high))) / 2;
    const auto exact = static_cast<float>(middle);
    ASSERT_EQ(static_cast<double>(exact), middle);
    ASSERT_EQ(FloatToHalf(exact), bits % 2 == 0 ? low : high) << bits;
    ASSERT_EQ(FloatToHalf(std::nextafter(exact, 0.0f)), low) << bits;
    ASSERT_EQ(FloatToHalf(std::nextafter(exact, 1e9f)), high) << bits;
  }
}

TEST(HalfTest, OverflowsToInfinityFromTheMiddleOn) {
  EXPECT_EQ(FloatToHalf(65519.996f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);
}

}  // namespace
}  // namespace walsh
