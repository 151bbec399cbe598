#include "worker/gptq/codebook.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "worker/tensor/half.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq {
namespace {

// Σ importance · (w − nearest level)² of a row.
double Cost(const Matrix& columns, int64_t row, const std::vector<double>& importance,
            const std::vector<double>& levels) {
  double cost = 0;
  for (int64_t c = 0; c < columns.rows(); ++c) {
    double nearest = std::numeric_limits<double>::infinity();
    for (double level : levels) nearest = std::min(nearest, std::abs(columns(c, row) - level));
    cost += importance[static_cast<size_t>(c)] * nearest * nearest;
  }
  return cost;
}

std::vector<double> Levels(const TileGrid& grid, int64_t row) {
  std::vector<double> levels;
  for (int k = 0; k < kLevels; ++k) levels.push_back(grid.levels[k][row]);
  return levels;
}

// Lloyd's iteration from a start: a local optimum.
std::vector<double> Lloyd(const Matrix& columns, int64_t row, const std::vector<double>& importance,
                          std::vector<double> levels) {
  for (int round = 0; round < 200; ++round) {
    double mass[kLevels] = {}, moment[kLevels] = {};
    for (int64_t c = 0; c < columns.rows(); ++c) {
      size_t nearest = 0;
      for (size_t k = 1; k < levels.size(); ++k) {
        if (std::abs(columns(c, row) - levels[k]) < std::abs(columns(c, row) - levels[nearest])) {
          nearest = k;
        }
      }
      mass[nearest] += importance[static_cast<size_t>(c)];
      moment[nearest] += importance[static_cast<size_t>(c)] * columns(c, row);
    }
    for (size_t k = 0; k < levels.size(); ++k) {
      if (mass[k] > 0) levels[k] = moment[k] / mass[k];
    }
  }
  return levels;
}

// No start of Lloyd's iteration ends better, and some end as well.
TEST(FindLevelsTest, IsTheGlobalOptimum) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const int64_t n : {32, 77, 128}) {
    Matrix columns(n, kTileRows);
    for (float& w : columns.span()) w = 0.05f * normal(random);
    std::vector<double> importance;
    for (int64_t c = 0; c < n; ++c) importance.push_back(std::exp(normal(random)));
    TileGrid grid;
    FindLevels(columns.data(), n, importance, grid);
    for (int64_t row = 0; row < kTileRows; ++row) {
      const double found = Cost(columns, row, importance, Levels(grid, row));
      double best = std::numeric_limits<double>::infinity();
      for (int start = 0; start < 40; ++start) {
        std::vector<double> levels;
        for (int k = 0; k < kLevels; ++k) {
          levels.push_back(columns(static_cast<int64_t>(random() % static_cast<uint64_t>(n)), row));
        }
        best = std::min(best, Cost(columns, row, importance,
                                   Lloyd(columns, row, importance, std::move(levels))));
      }
      // Half precision moves the levels a little.
      EXPECT_LE(found, best * 1.0001);
      EXPECT_GE(found, best * 0.8);
    }
  }
}

TEST(FindLevelsTest, LevelsAscendAndAreHalves) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  Matrix columns(64, kTileRows);
  for (float& w : columns.span()) w = normal(random);
  TileGrid grid;
  FindLevels(columns.data(), 64, std::vector<double>(64, 1.0), grid);
  for (int64_t row = 0; row < kTileRows; ++row) {
    for (int k = 0; k < kLevels; ++k) {
      EXPECT_EQ(HalfToFloat(FloatToHalf(grid.levels[k][row])), grid.levels[k][row]);
      if (k > 0) {
        EXPECT_LT(grid.levels[k - 1][row], grid.levels[k][row]);
      }
    }
  }
}

// A heavy column pulls a level onto itself.
TEST(FindLevelsTest, ImportanceCounts) {
  Matrix columns(32, kTileRows);
  for (int64_t c = 0; c < 32; ++c) {
    for (int64_t row = 0; row < kTileRows; ++row) columns(c, row) = static_cast<float>(c);
  }
  std::vector<double> importance(32, 1.0);
  TileGrid even, uneven;
  FindLevels(columns.data(), 32, importance, even);
  importance[5] = 1e9;
  FindLevels(columns.data(), 32, importance, uneven);
  EXPECT_EQ(Levels(even, 0), (std::vector<double>{3.5, 11.5, 19.5, 27.5}));
  const std::vector<double> levels = Levels(uneven, 3);
  EXPECT_NE(std::find(levels.begin(), levels.end(), 5.0), levels.end());
}

TEST(FindLevelsTest, FewDistinctAndExtremeWeights) {
  Matrix columns(32, kTileRows);
  for (int64_t c = 0; c < 32; ++c) {
    columns(c, 0) = 0;
    columns(c, 1) = c % 2 == 0 ? -1.0f : 2.0f;
    columns(c, 2) = c % 3 == 0 ? 1e30f : -1e30f;
    columns(c, 3) = 1e-38f;
    columns(c, 5) = c == 7 ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
    columns(c, 4) = 1000.0f + 0.5f * static_cast<float>(c % 4);
  }
  TileGrid grid;
  FindLevels(columns.data(), 32, std::vector<double>(32, 1e-300), grid);
  const std::vector<double> importance(32, 1.0);
  EXPECT_EQ(Cost(columns, 0, importance, Levels(grid, 0)), 0);
  EXPECT_EQ(Cost(columns, 1, importance, Levels(grid, 1)), 0);
  EXPECT_EQ(Levels(grid, 2).front(), -kScaleMax);
  EXPECT_EQ(Levels(grid, 2).back(), kScaleMax);
  EXPECT_EQ(Levels(grid, 3).back(), 0);
  EXPECT_EQ(Cost(columns, 4, importance, Levels(grid, 4)), 0);
  EXPECT_EQ(Levels(grid, 5), std::vector<double>(4, 0.0));
  FindLevels(columns.data(), 2, std::vector<double>(2, 1.0), grid);
  EXPECT_EQ(Levels(grid, 1).front(), -1);
  EXPECT_EQ(Levels(grid, 1).back(), 2);
}

}  // namespace
}  // namespace walsh::gptq
