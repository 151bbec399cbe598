#include "worker/gptq/tile.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hwy/highway.h"
#include "tests/unit/worker/kernels/kernel_harness.h"
#include "worker/tensor/half.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq {
namespace {

Matrix RandomTile(int64_t columns, float size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Matrix tile(columns, kTileRows);
  for (float& v : tile.span()) v = normal(random) * size;
  return tile;
}

// With each instruction set that this machine has and the product is compiled for.
class TileTest : public ::testing::TestWithParam<int64_t> {
 private:
  const kernels::HighwayTarget only_{GetParam()};
};
class FindGridTest : public TileTest {};
class QuantizeColumnsTest : public TileTest {};

std::string TargetName(const ::testing::TestParamInfo<int64_t>& info) {
  return hwy::TargetName(info.param);
}
INSTANTIATE_TEST_SUITE_P(Targets, FindGridTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()), TargetName);
INSTANTIATE_TEST_SUITE_P(Targets, QuantizeColumnsTest,
                         ::testing::ValuesIn(hwy::SupportedAndGeneratedTargets()), TargetName);

// Sum of |w − quantized|^2.4 of one row on a given grid, in double.
double RowError(const Matrix& tile, int64_t row, int bits, double scale, double zero) {
  double error = 0;
  for (int64_t c = 0; c < tile.rows(); ++c) {
    const double w = tile(c, row);
    const double code =
        std::min(std::max(std::nearbyint(w / scale) + zero, 0.0), std::exp2(bits) - 1);
    error += std::pow(std::abs(scale * (code - zero) - w), 2.4);
  }
  return error;
}

// The chosen grid is, up to the precision of floats, the best of the 80 that are tried.
TEST_P(FindGridTest, FindsTheBestOfEightyShrunkRanges) {
  for (int bits : {2, 3, 4, 8}) {
    for (bool symmetric : {false, true}) {
      for (int64_t columns : {1, 32, 77}) {
        const Matrix tile = RandomTile(columns, 0.05f, static_cast<uint32_t>(bits + columns));
        TileGrid grid;
        FindGrid({bits, symmetric, true}, tile.data(), columns, grid);
        for (int64_t r = 0; r < kTileRows; ++r) {
          double low = 0, high = 0;
          for (int64_t c = 0; c < columns; ++c) {
            low = std::min<double>(low, tile(c, r));
            high = std::max<double>(high, tile(c, r));
          }
          if (symmetric) low = -(high = std::max(high, -low));
          double best = INFINITY;
          for (int step = 0; step < 80; ++step) {
            const double p = 1 - step / 100.0;
            const double scale = HalfToFloat(
                FloatToHalf(static_cast<float>(p * (high - low) / (std::exp2(bits) - 1))));
            const double zero = symmetric ? std::exp2(bits - 1) : std::nearbyint(-p * low / scale);
            best = std::min(best, RowError(tile, r, bits, scale, zero));
          }
          const double found = RowError(tile, r, bits, grid.scales[r], grid.zeros[r]);
          ASSERT_LE(found, best * (1 + 1e-4) + 1e-30)
              << bits << " bits, " << columns << " columns, row " << r;
        }
      }
    }
  }
}

TEST_P(FindGridTest, WithoutSearchCoversTheWholeRange) {
  const Matrix tile = RandomTile(64, 1.0f, 3);
  TileGrid grid;
  FindGrid({4, false, false}, tile.data(), 64, grid);
  for (int64_t r = 0; r < kTileRows; ++r) {
    float low = 0, high = 0;
    for (int64_t c = 0; c < 64; ++c) {
      low = std::min(low, tile(c, r));
      high = std::max(high, tile(c, r));
    }
    EXPECT_EQ(grid.scales[r], HalfToFloat(FloatToHalf((high - low) / 15)));
    EXPECT_EQ(grid.zeros[r], std::nearbyint(-low / grid.scales[r]));
  }
}

TEST_P(FindGridTest, ScalesAreHalvesInRangeAndZerosAreCodes) {
  for (float size : {1e-38f, 1e-8f, 3e-5f, 1.0f, 1e5f, 1e30f, 1e38f}) {
    for (int bits : {2, 3, 4, 8}) {
      const Matrix tile = RandomTile(32, size, 5);
      TileGrid grid;
      FindGrid({bits, false, true}, tile.data(), 32, grid);
      for (int64_t r = 0; r < kTileRows; ++r) {
        EXPECT_EQ(HalfToFloat(FloatToHalf(grid.scales[r])), grid.scales[r]);
        EXPECT_GE(grid.scales[r], kScaleMin);
        EXPECT_LE(grid.scales[r], kScaleMax);
        EXPECT_EQ(grid.zeros[r], std::nearbyint(grid.zeros[r]));
        EXPECT_GE(grid.zeros[r], 0);
        EXPECT_LE(grid.zeros[r], (1 << bits) - 1);
      }
    }
  }
}

TEST_P(FindGridTest, ZeroGroupGetsScaleOneAndZeroIsExact) {
  const Matrix tile(16, kTileRows);
  for (bool symmetric : {false, true}) {
    TileGrid grid;
    FindGrid({3, symmetric, true}, tile.data(), 16, grid);
    EXPECT_EQ(grid.scales[0], 1.0f);
    EXPECT_EQ(grid.zeros[0], symmetric ? 4.0f : 0.0f);
  }
}

TEST_P(QuantizeColumnsTest, RoundsToNearestWithoutFactor) {
  Matrix weights = RandomTile(8, 1.0f, 9), codes(8, kTileRows);
  const Matrix before = weights.Copy();
  TileGrid grid;
  FindGrid({4, false, false}, weights.data(), 8, grid);
  QuantizeColumnsParams p;
  p.bits = 4;
  p.n = 8;
  p.last = 8;
  p.grid = &grid;
  p.weights = weights.data();
  p.codes = codes.data();
  QuantizeColumns(p);
  for (int64_t c = 0; c < 8; ++c) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      ASSERT_EQ(weights(c, r), before(c, r));
      const float quantized = grid.scales[r] * (codes(c, r) - grid.zeros[r]);
      ASSERT_LE(std::abs(quantized - before(c, r)), 0.51f * grid.scales[r]);
    }
  }
}

struct TileResult {
  TileGrid grid;
  Matrix codes, weights, errors;
};

// A group of 48 columns on a searched grid, then its columns with their errors passed on.
TileResult QuantizeOneTile() {
  constexpr int64_t kColumns = 48;
  TileResult result{{},
                    Matrix(kColumns, kTileRows),
                    RandomTile(kColumns, 0.05f, 11),
                    Matrix(kColumns, kTileRows)};
  Matrix u = RandomTile(kColumns * kColumns / kTileRows, 0.1f, 12);
  for (int64_t i = 0; i < kColumns; ++i) u.data()[i * kColumns + i] = 1;
  FindGrid({3, false, true}, result.weights.data(), kColumns, result.grid);
  QuantizeColumnsParams p;
  p.bits = 3;
  p.n = kColumns;
  p.last = kColumns;
  p.grid = &result.grid;
  p.weights = result.weights.data();
  p.u = u.data();
  p.u_stride = kColumns;
  p.codes = result.codes.data();
  p.errors = result.errors.data();
  QuantizeColumns(p);
  return result;
}

// Vectors of 8 and of 16 lanes give the same bits. Older instruction sets do not fuse
// multiplication and addition and round once more.
TEST(TileTargetsTest, WidthOfTheVectorsDoesNotMatter) {
  std::optional<TileResult> first;
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (target > HWY_AVX2) continue;
    const kernels::HighwayTarget only(target);
    TileResult result = QuantizeOneTile();
    if (!first.has_value()) {
      first = std::move(result);
      continue;
    }
    SCOPED_TRACE(hwy::TargetName(target));
    EXPECT_TRUE(std::ranges::equal(result.grid.scales, first->grid.scales));
    EXPECT_TRUE(std::ranges::equal(result.grid.zeros, first->grid.zeros));
    EXPECT_TRUE(std::ranges::equal(result.codes.span(), first->codes.span()));
    EXPECT_TRUE(std::ranges::equal(result.weights.span(), first->weights.span()));
    EXPECT_TRUE(std::ranges::equal(result.errors.span(), first->errors.span()));
  }
}

}  // namespace
}  // namespace walsh::gptq
