#include "worker/rotate/rotation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh::rotate {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

constexpr Kind kAllKinds[] = {Kind::kNone, Kind::kHadamard, Kind::kWalsh, Kind::kLocalHadamard,
                              Kind::kGsr};

Rotation Make(int64_t width, Kind kind, bool signs = false, uint64_t seed = 0, int64_t block = 0) {
  Rotation::Options options{kind, block, signs, seed};
  if (IsLocal(kind) && block == 0) options.block = DefaultBlock(width, 128).value();
  auto rotation = Rotation::Create(width, options);
  EXPECT_OK(rotation);
  return *std::move(rotation);
}

TEST(KindTest, NamesRoundTrip) {
  for (Kind kind : kAllKinds) {
    ASSERT_OK_AND_ASSIGN(const Kind parsed, ParseKind(KindName(kind)));
    EXPECT_EQ(parsed, kind);
  }
  EXPECT_THAT(ParseKind("spin"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("spin")));
}

TEST(DefaultBlockTest, LargestPowerOfTwoWithinGroupThatDividesTheWidth) {
  EXPECT_EQ(DefaultBlock(4096, 128).value(), 128);
  EXPECT_EQ(DefaultBlock(4096, 256).value(), 128);
  EXPECT_EQ(DefaultBlock(4096, -1).value(), 128);
  EXPECT_EQ(DefaultBlock(4096, 32).value(), 32);
  EXPECT_EQ(DefaultBlock(576, 128).value(), 64);
  EXPECT_EQ(DefaultBlock(288, 64).value(), 32);
  EXPECT_EQ(DefaultBlock(64, 128).value(), 64);
  EXPECT_THAT(DefaultBlock(172, 128),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("172")));
  EXPECT_THAT(DefaultBlock(4096, 8), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST(RotationTest, EveryKindIsOrthogonalAtEveryTestedWidth) {
  // A power of two; 36 · 16; and cores by Paley's first construction, over GF(25), and
  // Williamson's.
  for (int64_t width : {64, 128, 576, 352, 208, 688}) {
    for (Kind kind : kAllKinds) {
      for (bool signs : {false, true}) {
        const Rotation rotation = Make(width, kind, signs, 7);
        const std::vector<double> r = rotation.Dense();
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t j = i; j < width; ++j) {
            double dot = 0;
            for (int64_t k = 0; k < width; ++k) dot += r[i * width + k] * r[j * width + k];
            ASSERT_NEAR(dot, i == j ? 1.0 : 0.0, 1e-12) << KindName(kind) << " " << width;
          }
        }
      }
    }
  }
}

TEST(RotationTest, DenseFormIsTheNamedMatrix) {
  for (int64_t width : {128, 352, 576}) {
    const double scale = 1 / std::sqrt(static_cast<double>(width));
    ASSERT_OK_AND_ASSIGN(const auto hadamard, HadamardMatrix(width));
    ASSERT_OK_AND_ASSIGN(const auto walsh_rows, WalshMatrix(width));
    const auto dense_hadamard = Make(width, Kind::kHadamard).Dense();
    const auto dense_walsh = Make(width, Kind::kWalsh).Dense();
    for (size_t i = 0; i < hadamard.size(); ++i) {
      ASSERT_NEAR(dense_hadamard[i], scale * hadamard[i], 1e-12);
      ASSERT_NEAR(dense_walsh[i], scale * walsh_rows[i], 1e-12);
    }
  }
}

TEST(RotationTest, LocalKindsAreBlockDiagonal) {
  ASSERT_OK_AND_ASSIGN(const auto walsh_rows, WalshMatrix(64));
  ASSERT_OK_AND_ASSIGN(const auto hadamard, HadamardMatrix(64));
  const auto gsr = Make(576, Kind::kGsr).Dense();
  const auto local = Make(576, Kind::kLocalHadamard).Dense();
  for (int64_t i = 0; i < 576; ++i) {
    for (int64_t j = 0; j < 576; ++j) {
      const bool inside = i / 64 == j / 64;
      const size_t entry = static_cast<size_t>(i % 64 * 64 + j % 64);
      ASSERT_NEAR(gsr[i * 576 + j], inside ? walsh_rows[entry] / 8.0 : 0.0, 1e-12);
      ASSERT_NEAR(local[i * 576 + j], inside ? hadamard[entry] / 8.0 : 0.0, 1e-12);
    }
  }
}

TEST(RotationTest, TransposeUndoesTheRotation) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (int64_t width : {64, 128, 352, 384, 576, 688}) {
    for (Kind kind : kAllKinds) {
      const Rotation rotation = Make(width, kind, true, 3);
      const int64_t stride = width + 5;
      std::vector<double> x(static_cast<size_t>(3 * stride));
      for (double& v : x) v = normal(random);
      std::vector<double> y = x;
      rotation.ApplyRight(y.data(), 3, stride);
      if (kind != Kind::kNone) {
        EXPECT_GT(std::abs(y[1] - x[1]), 1e-6);
      }
      rotation.ApplyRightTransposed(y.data(), 3, stride);
      for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(y[i], x[i], 1e-12) << KindName(kind);
    }
  }
}

// R = diag(s) H: signs act before the transform, and only on it.
TEST(RotationTest, SeededSignsFlipRowsOfTheMatrix) {
  const auto plain = Make(576, Kind::kWalsh).Dense();
  const auto first = Make(576, Kind::kWalsh, true, 1).Dense();
  const auto again = Make(576, Kind::kWalsh, true, 1).Dense();
  const auto second = Make(576, Kind::kWalsh, true, 2).Dense();
  EXPECT_EQ(first, again);
  EXPECT_NE(first, second);
  int64_t flipped = 0;
  for (int64_t i = 0; i < 576; ++i) {
    const double sign = first[i * 576] / plain[i * 576];
    for (int64_t j = 0; j < 576; ++j) {
      ASSERT_NEAR(first[i * 576 + j], sign * plain[i * 576 + j], 1e-12);
    }
    flipped += sign < 0 ? 1 : 0;
  }
  EXPECT_GT(flipped, 576 / 3);
  EXPECT_LT(flipped, 576 * 2 / 3);
}

TEST(RotationTest, RefusesWhatDoesNotExist) {
  // 23 · 4 · 2^k and 107 · 4 · 2^k, of ChatGLM.
  EXPECT_THAT(Rotation::Create(736, {Kind::kHadamard, 0, false, 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("gsr")));
  EXPECT_THAT(Rotation::Create(13696, {Kind::kWalsh, 0, false, 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("13696")));
  EXPECT_THAT(Rotation::Create(576, {Kind::kGsr, 128, false, 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("does not divide")));
  for (int64_t block : {0, 8, 48, -64}) {
    EXPECT_THAT(Rotation::Create(576, {Kind::kGsr, block, false, 0}),
                HasCode(absl::StatusCode::kInvalidArgument))
        << block;
  }
  EXPECT_THAT(Rotation::Create(0, {Kind::kNone, 0, false, 0}),
              HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::rotate
