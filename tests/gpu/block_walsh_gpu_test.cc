// cuda::BlockWalsh against kernels::ref over a sweep of shapes. What lies between and around the
// rows is poisoned with NaN of a known pattern and must come back bit for bit.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/device_memory.h"
#include "tests/testing/status_matchers.h"
#include "worker/kernels/cuda/block_walsh.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels::cuda {
namespace {

using ::walsh::testing::DeviceFloats;
using ::walsh::testing::HasCode;

constexpr uint32_t kPoison = 0x7FC0DEAD;
constexpr double kNmseMax = 1e-10;

struct Shape {
  int64_t rows;
  int64_t n_row_blocks;
  int64_t block;
  int64_t padding;  // of each row
  int64_t offset;   // of the first row; 1 makes every quad misaligned
  bool sequency;

  int64_t cols() const { return n_row_blocks * block; }
  int64_t stride() const { return cols() + padding; }
  size_t n_floats() const { return static_cast<size_t>(offset + rows * stride() + 8); }
  BlockWalshParams Params(float* base) const {
    return {.rows = rows,
            .cols = cols(),
            .block = block,
            .sequency = sequency,
            .x = base + offset,
            .x_stride = stride()};
  }
  std::string Name() const {
    return "rows " + std::to_string(rows) + ", blocks " + std::to_string(n_row_blocks) + " of " +
           std::to_string(block) + ", padding " + std::to_string(padding) + ", offset " +
           std::to_string(offset) + (sequency ? ", sequency" : ", natural");
  }
};

std::vector<float> RandomInput(const Shape& shape, uint64_t seed) {
  std::vector<float> x(shape.n_floats(), std::bit_cast<float>(kPoison));
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t col = 0; col < shape.cols(); ++col) {
      x[static_cast<size_t>(shape.offset + row * shape.stride() + col)] = normal(random);
    }
  }
  return x;
}

// Σ (a − b)² / Σ b², and every poisoned float unchanged.
void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected,
                 const std::string& name) {
  double error = 0;
  double power = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::bit_cast<uint32_t>(expected[i]) == kPoison) {
      ASSERT_EQ(std::bit_cast<uint32_t>(actual[i]), kPoison) << name << ", index " << i;
      continue;
    }
    ASSERT_TRUE(std::isfinite(actual[i])) << name << ", index " << i;
    error += std::pow(static_cast<double>(actual[i]) - expected[i], 2);
    power += std::pow(static_cast<double>(expected[i]), 2);
  }
  ASSERT_LE(error, kNmseMax * power) << name;
}

void CheckShape(const Shape& shape) {
  const std::vector<float> input = RandomInput(shape, /*seed=*/shape.n_floats());
  std::vector<float> expected = input;
  ASSERT_OK(ref::BlockWalsh(shape.Params(expected.data()), Stream{.backend = Backend::kRef}));
  DeviceFloats device(input);
  ASSERT_OK(BlockWalsh(shape.Params(device.data()), nullptr)) << shape.Name();
  const std::vector<float> once = device.Read();
  ExpectClose(once, expected, shape.Name());
  // Its own inverse.
  ASSERT_OK(BlockWalsh(shape.Params(device.data()), nullptr));
  ExpectClose(device.Read(), input, shape.Name() + ", twice");
}

TEST(BlockWalshGpuTest, MatchesTheReferenceOverShapes) {
  WALSH_REQUIRE_GPU();
  for (const int64_t block : {16, 32, 64, 128, 256}) {
    for (const int64_t rows : {0, 1, 2, 3, 7, 33}) {
      for (const int64_t n_row_blocks : {0, 1, 2, 3, 9, 17}) {
        for (const int64_t padding : {0, 1, 4, 13}) {
          for (const int64_t offset : {0, 1}) {
            for (const bool sequency : {true, false}) {
              CheckShape({rows, n_row_blocks, block, padding, offset, sequency});
              if (HasFatalFailure()) return;
            }
          }
        }
      }
    }
  }
}

// Larger than one wave of CTAs, so that the grid-stride loop turns more than once.
TEST(BlockWalshGpuTest, MatchesTheReferenceOnModelShapes) {
  WALSH_REQUIRE_GPU();
  for (const Shape& shape : {Shape{1536, 9, 64, 0, 0, true}, Shape{4096, 32, 128, 0, 0, true},
                             Shape{4096, 32, 128, 4, 0, true}, Shape{1023, 17, 256, 0, 0, true}}) {
    CheckShape(shape);
  }
}

// Against the definition itself: rows of ±1 sorted by their number of sign changes.
TEST(BlockWalshGpuTest, RowsHaveTheirSequency) {
  WALSH_REQUIRE_GPU();
  for (const int64_t block : {16, 32, 64, 128, 256}) {
    // One unit vector a row: row i of the result is column i of the Walsh matrix.
    const Shape shape{block, 1, block, 0, 0, true};
    std::vector<float> identity(shape.n_floats(), 0.0f);
    for (int64_t i = 0; i < block; ++i) identity[static_cast<size_t>(i * block + i)] = 1.0f;
    DeviceFloats device(identity);
    ASSERT_OK(BlockWalsh(shape.Params(device.data()), nullptr));
    const std::vector<float> walsh = device.Read();
    const float entry = 1.0f / std::sqrt(static_cast<float>(block));
    for (int64_t row = 0; row < block; ++row) {
      int n_changes = 0;
      for (int64_t col = 0; col < block; ++col) {
        const float value = walsh[static_cast<size_t>(col * block + row)];
        ASSERT_NEAR(std::fabs(value), entry, 1e-6) << row << " " << col;
        if (col > 0 && (value > 0) != (walsh[static_cast<size_t>((col - 1) * block + row)] > 0)) {
          ++n_changes;
        }
      }
      ASSERT_EQ(n_changes, row) << "block " << block;
    }
  }
}

TEST(BlockWalshGpuTest, TwoRunsGiveTheSameBytes) {
  WALSH_REQUIRE_GPU();
  const Shape shape{513, 9, 64, 0, 0, true};
  const std::vector<float> input = RandomInput(shape, 1);
  DeviceFloats a(input);
  DeviceFloats b(input);
  ASSERT_OK(BlockWalsh(shape.Params(a.data()), nullptr));
  ASSERT_OK(BlockWalsh(shape.Params(b.data()), nullptr));
  const std::vector<float> first = a.Read();
  const std::vector<float> second = b.Read();
  EXPECT_EQ(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)), 0);
}

// Refused before any CUDA call, so this runs without a GPU.
TEST(BlockWalshGpuTest, RefusesShapesItCannotDo) {
  float x[512] = {};
  for (const int64_t block : {0, 1, 8, 12, 48, 512}) {
    EXPECT_THAT(
        BlockWalsh({.rows = 1, .cols = 512, .block = block, .x = x, .x_stride = 512}, nullptr),
        HasCode(absl::StatusCode::kInvalidArgument))
        << block;
  }
  EXPECT_THAT(BlockWalsh({.rows = 1, .cols = 40, .block = 16, .x = x, .x_stride = 40}, nullptr),
              HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(BlockWalsh({.rows = 2, .cols = 32, .block = 16, .x = x, .x_stride = 31}, nullptr),
              HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::kernels::cuda
