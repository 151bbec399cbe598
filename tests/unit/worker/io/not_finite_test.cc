#include "worker/io/not_finite.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "worker/tensor/half.h"

namespace walsh {
namespace {

// Every value there is, against the conversion.
TEST(NotFiniteTest, KnowsEveryValue) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const std::vector<uint16_t> value = {static_cast<uint16_t>(bits)};
    ASSERT_EQ(FirstNotFiniteBf16(value).has_value(), !std::isfinite(Bf16ToFloat(value[0]))) << bits;
    ASSERT_EQ(FirstNotFiniteHalf(value).has_value(), !std::isfinite(HalfToFloat(value[0]))) << bits;
  }
}

TEST(NotFiniteTest, FindsTheFirst) {
  EXPECT_EQ(FirstNotFiniteBf16({}), std::nullopt);
  // Longer than a stretch that is looked through at once, and no multiple of it.
  std::vector<uint16_t> values(3 * 4096 + 5, FloatToBf16(1.0f));
  EXPECT_EQ(FirstNotFiniteBf16(values), std::nullopt);
  for (const size_t at : {values.size() - 1, size_t{8192}, size_t{4097}, size_t{4095}, size_t{0}}) {
    values[at] = 0x7fc0;  // those behind it stay
    EXPECT_EQ(FirstNotFiniteBf16(values), static_cast<int64_t>(at));
  }
}

}  // namespace
}  // namespace walsh
