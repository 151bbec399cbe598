#include "client/terminal/quantities.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(QuantitiesTest, Bytes) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(999), "999 B");
  EXPECT_EQ(BytesText(1000), "1.00 kB");
  EXPECT_EQ(BytesText(98'362'432), "98.4 MB");
  EXPECT_EQ(BytesText(999'600), "1.00 MB");
  EXPECT_EQ(BytesText(1'250'000'000), "1.25 GB");
  EXPECT_EQ(BytesText(9'000'000'000'000'000'000), "9000 PB");
}

TEST(QuantitiesTest, Counts) {
  EXPECT_EQ(CountText(0), "0");
  EXPECT_EQ(CountText(999), "999");
  EXPECT_EQ(CountText(1000), "1,000");
  EXPECT_EQ(CountText(1234567), "1,234,567");
  EXPECT_EQ(CountText(-123), "-123");
  EXPECT_EQ(CountText(-1234), "-1,234");
}

TEST(QuantitiesTest, Times) {
  EXPECT_EQ(ClockText(absl::Seconds(7)), "0:07");
  EXPECT_EQ(ClockText(absl::Milliseconds(59'600)), "1:00");
  EXPECT_EQ(ClockText(absl::Seconds(754)), "12:34");
  EXPECT_EQ(ClockText(absl::Seconds(3723)), "1:02:03");
  EXPECT_EQ(SecondsText(0.0012), "0.0012 s");
  EXPECT_EQ(SecondsText(0.123), "0.12 s");
  EXPECT_EQ(SecondsText(12.34), "12.3 s");
  EXPECT_EQ(SecondsText(123.4), "123 s");
  EXPECT_EQ(TimeText({}), "-");
}

TEST(QuantitiesTest, SignificantDigits) {
  EXPECT_EQ(SignificantText(0, 3), "0");
  EXPECT_EQ(SignificantText(17.3456, 4), "17.35");
  EXPECT_EQ(SignificantText(0.012345, 3), "0.0123");
  EXPECT_EQ(SignificantText(3.14e-7, 2), "3.1e-07");
  EXPECT_EQ(SignificantText(123456, 3), "123456");
  EXPECT_EQ(EstimateText(26.1234, 0.456, 5), "26.123 ± 0.46");
  EXPECT_EQ(EstimateText(26.1234, 0, 5), "26.123");
}

}  // namespace
}  // namespace walsh::client
