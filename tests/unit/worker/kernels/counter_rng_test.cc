#include "worker/kernels/counter_rng.h"

#include <gtest/gtest.h>

#include <set>

namespace walsh::kernels {
namespace {

TEST(CounterRngTest, PhiloxMatchesThePublishedVectors) {
  // kat_vectors of Random123: philox4x32, 10 rounds.
  EXPECT_EQ(Philox4x32({{0, 0, 0, 0}}, {{0, 0}}),
            (PhiloxBlock{{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  EXPECT_EQ(
      Philox4x32({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, {{0xffffffff, 0xffffffff}}),
      (PhiloxBlock{{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  EXPECT_EQ(
      Philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}}),
      (PhiloxBlock{{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST(CounterRngTest, UniformTakesEveryBitOfSeedAndPosition) {
  std::set<double> numbers = {UniformAt(0, 0)};
  for (int bit = 0; bit < 64; ++bit) {
    numbers.insert(UniformAt(uint64_t{1} << bit, 0));
    numbers.insert(UniformAt(0, uint64_t{1} << bit));
  }
  EXPECT_EQ(numbers.size(), 129u);
  EXPECT_GE(*numbers.begin(), 0.0);
  EXPECT_LT(*numbers.rbegin(), 1.0);
}

}  // namespace
}  // namespace walsh::kernels
