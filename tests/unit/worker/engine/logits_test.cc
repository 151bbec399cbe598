#include "worker/engine/logits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "hwy/highway.h"

namespace walsh::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The contract, written for reading.
int64_t ReferenceArgMax(std::span<const float> values) {
  int64_t best = -1;
  float max = -kInfinity;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) return -1;
    if (values[i] > max) {
      max = values[i];
      best = static_cast<int64_t>(i);
    }
  }
  return best;
}

// Runs `test` with each of Highway's targets that this machine has.
template <typename Test>
void ForEachTarget(Test test) {
  for (int64_t targets = hwy::SupportedTargets(); targets != 0; targets &= targets - 1) {
    const int64_t target = targets & -targets;
    hwy::GetChosenTarget().Update(target);
    SCOPED_TRACE(hwy::TargetName(target));
    test();
  }
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// All sizes around a vector's and a block's, and such as vocabularies have.
std::vector<int64_t> Sizes() {
  std::vector<int64_t> sizes(140);
  std::iota(sizes.begin(), sizes.end(), 0);
  for (const int64_t n : {1023, 1024, 1025, 2047, 2048, 2049, 2080, 4095, 4097, 49152, 50257}) {
    sizes.push_back(n);
  }
  return sizes;
}

TEST(LogitsTest, ArgMaxIsTheFirstOfTheLargest) {
  ForEachTarget([] {
    std::mt19937 rng(1);
    for (const int64_t n : Sizes()) {
      std::vector<float> values(static_cast<size_t>(n) + 3);
      for (size_t offset = 0; offset < 3; ++offset) {
        // Few values, so that most are equal to others.
        for (float& value : values) value = static_cast<float>(static_cast<int>(rng() % 7) - 3);
        const std::span<const float> row(values.data() + offset, static_cast<size_t>(n));
        ASSERT_EQ(ArgMax(row), ReferenceArgMax(row)) << n << " at " << offset;
        for (float& value : values) value = std::normal_distribution<float>()(rng);
        ASSERT_EQ(ArgMax(row), ReferenceArgMax(row)) << n << " at " << offset;
      }
    }
  });
}

TEST(LogitsTest, ArgMaxFindsTheLargestWhereverItIs) {
  ForEachTarget([] {
    for (const int64_t n : {1, 5, 16, 33, 100, 2050}) {
      std::vector<float> values(static_cast<size_t>(n), -1.0f);
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = 2.0f;
        ASSERT_EQ(ArgMax(values), static_cast<int64_t>(i)) << n;
        values[i] = kInfinity;
        ASSERT_EQ(ArgMax(values), static_cast<int64_t>(i)) << n;
        values[i] = kNan;
        ASSERT_EQ(ArgMax(values), -1) << n << " with NaN at " << i;
        values[i] = -1.0f;
      }
    }
  });
}

TEST(LogitsTest, ArgMaxOfNothingIsNone) {
  ForEachTarget([] {
    EXPECT_EQ(ArgMax({}), -1);
    for (const size_t n : {1u, 7u, 64u, 3000u}) {
      std::vector<float> values(n, -kInfinity);
      EXPECT_EQ(ArgMax(values), -1) << n;
      values.back() = std::numeric_limits<float>::lowest();
      EXPECT_EQ(ArgMax(values), static_cast<int64_t>(n) - 1);
    }
    const std::vector<float> zeros = {-1.0f, -0.0f, 0.0f};
    EXPECT_EQ(ArgMax(zeros), 1) << "zeros of both signs are equal";
  });
}

TEST(LogitsTest, WeightsAreExponentialsAndSumsTheirBlocks) {
  ForEachTarget([] {
    std::mt19937 rng(2);
    for (const int64_t n : Sizes()) {
      if (n == 0) continue;
      std::vector<float> logits(static_cast<size_t>(n));
      for (float& logit : logits) logit = std::normal_distribution<float>(0, 8)(rng);
      logits[rng() % logits.size()] = -kInfinity;
      const int64_t best = ArgMax(logits);
      if (best < 0) continue;
      const float max = logits[best];
      for (const double temperature : {0.3, 1.0, 2.0}) {
        const float floor = max - 10.0f;
        std::vector<float> weights(logits.size(), kNan);
        std::vector<double> sums((logits.size() + kWeightsBlock - 1) / kWeightsBlock, kNan);
        ExpWeights({.logits = logits,
                    .max_logit = max,
                    .temperature = temperature,
                    .floor = floor,
                    .weights = weights.data(),
                    .sums = sums.data()});
        std::vector<double> expected_sums(sums.size());
        for (size_t i = 0; i < logits.size(); ++i) {
          const double expected =
              logits[i] < floor ? 0 : std::exp((double{logits[i]} - double{max}) / temperature);
          ASSERT_NEAR(weights[i], expected, 1e-5 * expected) << i << " of " << n;
          expected_sums[i / kWeightsBlock] += weights[i];
        }
        ASSERT_EQ(weights[best], 1.0f);
        for (size_t i = 0; i < sums.size(); ++i) {
          ASSERT_NEAR(sums[i], expected_sums[i], 1e-12 * (1 + expected_sums[i]));
        }
      }
    }
  });
}

TEST(LogitsTest, WeightsOfExtremeTemperaturesStayDefined) {
  ForEachTarget([] {
    const std::vector<float> logits = {-kInfinity, 3.0f, -1e30f, 2.9999f, 3.0f};
    for (const double temperature : {1e-300, 1e-40, 1e-6, 2.0}) {
      std::vector<float> weights(logits.size());
      double sum = 0;
      ExpWeights({.logits = logits,
                  .max_logit = 3.0f,
                  .temperature = temperature,
                  .floor = -kInfinity,
                  .weights = weights.data(),
                  .sums = &sum});
      EXPECT_EQ(weights[0], 0);
      EXPECT_EQ(weights[1], 1);
      EXPECT_EQ(weights[2], 0);
      EXPECT_EQ(weights[4], 1);
      EXPECT_GE(sum, 2);
      EXPECT_LT(sum, 3.0001);
    }
  });
}

}  // namespace
}  // namespace walsh::engine
