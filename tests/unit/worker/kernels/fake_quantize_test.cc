#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "tests/unit/worker/kernels/kernel_harness.h"

namespace walsh::kernels {
namespace {

using testing::RandomFloats;

// The same in double, written from the formula of QuaRot's quantizers: codes first, then values.
// `margin` is how far x / scale is from where its code would change, for comparisons.
struct Expected {
  std::vector<double> values, margins;
  double scale = 0;
};
Expected QuantizeInDouble(const std::vector<float>& x, int bits, bool symmetric, double clip) {
  double high = 0, low = 0;
  for (const float v : x) {
    high = std::max(high, double{v} * clip);
    low = std::min(low, double{v} * clip);
  }
  const int n_codes = 1 << bits;
  Expected expected;
  int zero = n_codes / 2;
  if (symmetric) {
    expected.scale = std::max(high, -low) / (n_codes / 2 - 1);
  } else {
    expected.scale = (high - low) / (n_codes - 1);
    zero = static_cast<int>(std::lrint(-low / expected.scale));
  }
  for (const float v : x) {
    const double exact = v / expected.scale;
    const double code = std::min(std::max(std::rint(exact) + zero, 0.0), n_codes - 1.0);
    expected.values.push_back(expected.scale * (code - zero));
    expected.margins.push_back(std::abs(exact - std::floor(exact) - 0.5));
  }
  return expected;
}

struct Case {
  int64_t group;
  int bits;
  bool symmetric;
  float clip;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const int64_t group : {1, 3, 16, 31, 64, 128, 172}) {
    for (const int bits : {2, 4, 8}) {
      for (const bool symmetric : {false, true}) {
        for (const float clip : {1.0f, 0.9f}) cases.push_back({group, bits, symmetric, clip});
      }
    }
  }
  return cases;
}

void ExpectQuantized(const std::vector<float>& x, const Case& c, const Stream& stream) {
  constexpr int64_t kRows = 3, kGroups = 3;
  const int64_t cols = kGroups * c.group, stride = cols + 5;
  std::vector<float> y = x;
  ASSERT_OK(FakeQuantize({.rows = kRows,
                          .cols = cols,
                          .group = c.group,
                          .bits = c.bits,
                          .symmetric = c.symmetric,
                          .clip = c.clip,
                          .x = y.data(),
                          .x_stride = stride},
                         stream));
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t g = 0; g < kGroups; ++g) {
      const float* in = x.data() + row * stride + g * c.group;
      const float* out = y.data() + row * stride + g * c.group;
      const Expected expected =
          QuantizeInDouble({in, in + c.group}, c.bits, c.symmetric, double{c.clip});
      for (int64_t i = 0; i < c.group; ++i) {
        // Where a code is about to change, the next one is right too.
        const double slack = expected.margins[i] < 1e-4 ? expected.scale : 0;
        ASSERT_NEAR(out[i], expected.values[i], slack + 1e-5 * expected.scale * (1 << c.bits))
            << "group of " << c.group << ", " << c.bits << " bits, symmetric " << c.symmetric;
      }
    }
    for (int64_t i = cols; i < stride; ++i) ASSERT_EQ(y[row * stride + i], x[row * stride + i]);
  }
}

TEST(FakeQuantizeTest, LikeTheFormulaInDouble) {
  for (const Case& c : Cases()) {
    const auto x = RandomFloats(3 * (3 * c.group + 5), 1);
    ExpectQuantized(x, c, {.backend = Backend::kRef});
    ExpectQuantized(x, c, {});
    ThreadPool pool(3);
    ExpectQuantized(x, c, {.pool = &pool});
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      const HighwayTarget only(target);
      ExpectQuantized(x, c, {});
    }
  }
}

TEST(FakeQuantizeTest, BytesDoNotDependOnThreads) {
  const auto x = RandomFloats(300 * 512, 1);
  std::vector<float> first;
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    std::vector<float> y = x;
    ASSERT_OK(FakeQuantize({.rows = 300,
                            .cols = 512,
                            .group = 128,
                            .bits = 4,
                            .symmetric = false,
                            .clip = 0.95f,
                            .x = y.data(),
                            .x_stride = 512},
                           {.pool = &pool}));
    if (threads == 1) first = y;
    EXPECT_EQ(std::memcmp(first.data(), y.data(), y.size() * sizeof(float)), 0);
  }
}

std::vector<float> Quantized(std::vector<float> x, int bits, bool symmetric, float clip = 1) {
  const auto n = static_cast<int64_t>(x.size());
  EXPECT_OK(FakeQuantize({.rows = 1,
                          .cols = n,
                          .group = n,
                          .bits = bits,
                          .symmetric = symmetric,
                          .clip = clip,
                          .x = x.data(),
                          .x_stride = n},
                         {}));
  return x;
}

TEST(FakeQuantizeTest, HasAtMostAsManyLevelsAsCodes) {
  for (const int bits : {2, 3, 4}) {
    for (const bool symmetric : {false, true}) {
      const auto y = Quantized(RandomFloats(4096, 3), bits, symmetric);
      const std::set<float> levels(y.begin(), y.end());
      EXPECT_LE(levels.size(), size_t{1} << bits);
      EXPECT_GE(levels.size(), (size_t{1} << bits) - 1);
      EXPECT_TRUE(levels.contains(0.0f)) << "zero stays zero";
    }
  }
}

TEST(FakeQuantizeTest, KnownValues) {
  EXPECT_EQ(Quantized({-7, 7, 3.4f, -0.4f, 2.5f, 3.5f}, 4, true),
            (std::vector<float>{-7, 7, 3, 0, 2, 4}));
  EXPECT_EQ(Quantized({0, 15, 7.2f, -0.0f}, 4, false), (std::vector<float>{0, 15, 7, 0}));
  // Clipped at half: what lies beyond is cut off; the symmetric grid has one more below.
  EXPECT_EQ(Quantized({-14, 14, 3}, 4, true, 0.5f), (std::vector<float>{-8, 7, 3}));
  EXPECT_EQ(Quantized({0, 0, 0}, 4, false), (std::vector<float>{0, 0, 0}));
}

TEST(FakeQuantizeTest, WhatIsNotFiniteStaysVisible) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (const size_t at : {size_t{0}, size_t{40}}) {
      std::vector<float> x = RandomFloats(41, 1);
      x[at] = bad;
      for (const float v : Quantized(x, 4, false)) EXPECT_TRUE(std::isnan(v));
    }
  }
}

TEST(FakeQuantizeTest, RefusesWhatIsNoGrid) {
  std::vector<float> x(64);
  FakeQuantizeParams p{.rows = 1, .cols = 64, .group = 64, .x = x.data(), .x_stride = 64};
  p.bits = 9;
  EXPECT_THAT(FakeQuantize(p, {}), testing::HasCode(absl::StatusCode::kInvalidArgument));
  p.bits = 4;
  p.clip = 0;
  EXPECT_THAT(FakeQuantize(p, {}), testing::HasCode(absl::StatusCode::kInvalidArgument));
  p.clip = 1;
  p.group = 48;
  EXPECT_THAT(FakeQuantize(p, {}), testing::HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::kernels
