#include "worker/kernels/packed_matrix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "tests/unit/worker/kernels/random_quantized.h"

namespace walsh::kernels {
namespace {

using ::testing::HasSubstr;
using testing::RandomCodebook;
using testing::RandomFloatZeros;
using testing::RandomQuantized;
using testing::StatusIs;

TEST(PackedMatrixTest, DequantizeIsExact) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      for (const auto& [rows, cols, group] : {std::array<int64_t, 3>{1, 32, 32},
                                              {16, 64, 32},
                                              {17, 172, 172},
                                              {5, 7, 7},
                                              {33, 576, 64},
                                              {3, 256, 128},
                                              {40, 96, 96}}) {
        const QuantizedMatrix m = RandomQuantized(rows, cols, bits, group, symmetric);
        ASSERT_OK_AND_ASSIGN(const PackedMatrix packed, PackedMatrix::Pack(m));
        EXPECT_EQ(packed.rows(), rows);
        EXPECT_EQ(packed.cols(), cols);
        EXPECT_EQ(packed.bits(), bits);
        EXPECT_EQ(packed.group_size(), group);
        const Matrix dense = packed.Dequantize();
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < cols; ++c) {
            const int64_t at = r * m.groups() + c / group;
            const float expected =
                m.scales[at] * static_cast<float>(m.codes[r * cols + c] - m.zeros[at]);
            ASSERT_EQ(dense(r, c), expected) << bits << " bits, " << r << ", " << c;
          }
        }
      }
    }
  }
}

TEST(PackedMatrixTest, DequantizesFloatZerosAndCodebooksExactly) {
  for (const auto& [rows, cols, group] :
       {std::array<int64_t, 3>{1, 32, 32}, {17, 172, 172}, {33, 576, 64}, {40, 96, 96}}) {
    for (const QuantizedMatrix& m :
         {RandomFloatZeros(rows, cols, 2, group), RandomFloatZeros(rows, cols, 3, group),
          RandomCodebook(rows, cols, group)}) {
      ASSERT_OK_AND_ASSIGN(const PackedMatrix packed, PackedMatrix::Pack(m));
      const Matrix dense = packed.Dequantize();
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          const int64_t at = r * m.groups() + c / group;
          const int code = m.codes[r * cols + c];
          const float expected =
              m.has_codebook() ? m.levels[4 * at + code]
                               : m.scales[at] * (static_cast<float>(code) - m.float_zeros[at]);
          ASSERT_EQ(dense(r, c), expected) << r << ", " << c;
        }
      }
    }
  }
}

// What a pass over the weights reads: the codes and, for each group, a scale and a zero.
TEST(PackedMatrixTest, SizeIsThatOfTheCodesAndScales) {
  ASSERT_OK_AND_ASSIGN(const PackedMatrix two,
                       PackedMatrix::Pack(RandomQuantized(512, 512, 2, 128, false)));
  EXPECT_EQ(two.size_bytes(), 512 * 512 / 4 + 512 * 4 * 3);
  ASSERT_OK_AND_ASSIGN(const PackedMatrix three,
                       PackedMatrix::Pack(RandomQuantized(512, 512, 3, 128, true)));
  EXPECT_EQ(three.size_bytes(), 512 * 512 * 3 / 8 + 512 * 4 * 2);
  ASSERT_OK_AND_ASSIGN(const PackedMatrix zeros,
                       PackedMatrix::Pack(RandomFloatZeros(512, 512, 2, 128)));
  EXPECT_EQ(zeros.size_bytes(), 512 * 512 / 4 + 512 * 4 * 4);
  ASSERT_OK_AND_ASSIGN(const PackedMatrix codebook,
                       PackedMatrix::Pack(RandomCodebook(512, 512, 128)));
  EXPECT_EQ(codebook.size_bytes(), 512 * 512 / 4 + 512 * 4 * 8);
}

TEST(PackedMatrixTest, EmptyMatrices) {
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 64}, {16, 0}}) {
    QuantizedMatrix m = RandomQuantized(rows, cols, 4, std::max<int64_t>(1, cols), false);
    ASSERT_OK_AND_ASSIGN(const PackedMatrix packed, PackedMatrix::Pack(m));
    EXPECT_EQ(packed.Dequantize().size(), 0);
  }
}

TEST(PackedMatrixTest, RefusesWhatDoesNotFit) {
  const auto expect_refused = [](const QuantizedMatrix& m, const char* text) {
    EXPECT_THAT(PackedMatrix::Pack(m),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text)));
  };
  const QuantizedMatrix good = RandomQuantized(4, 64, 4, 32, false);
  ASSERT_OK(PackedMatrix::Pack(good));
  QuantizedMatrix m = good;
  m.bits = 5;
  expect_refused(m, "bits must be 2, 3, 4 or 8, is 5");
  m = good;
  m.group_size = 48;
  expect_refused(m, "group_size must divide cols 64, is 48");
  m.group_size = 0;
  expect_refused(m, "group_size must divide");
  m.group_size = 16;
  expect_refused(m, "group_size must be a multiple of 32 or the whole row, is 16");
  m = good;
  m.codes.pop_back();
  expect_refused(m, "codes has 255 values for 4 x 64");
  m = good;
  m.codes[9] = 16;
  expect_refused(m, "codes[9] must be below 16, is 16");
  m = good;
  m.scales.push_back(1);
  expect_refused(m, "scales has 9 values, needs 8");
  m = good;
  m.scales[3] = 0.1f;
  expect_refused(m, "scales[3] must be a finite half-precision number");
  m.scales[3] = std::numeric_limits<float>::infinity();
  expect_refused(m, "scales[3]");
  m = good;
  m.zeros[2] = 200;
  expect_refused(m, "zeros[2] must be below 16, is 200");
  m = good;
  m.rows = -1;
  expect_refused(m, "rows");
  m = RandomFloatZeros(4, 64, 4, 32);
  m.float_zeros[1] = 0.1f;
  expect_refused(m, "float_zeros[1] must be a finite half-precision number");
  m.float_zeros.pop_back();
  expect_refused(m, "float_zeros has 7 values and zeros 0, needs 8 and 0");
  const QuantizedMatrix codebook = RandomCodebook(4, 64, 32);
  m = codebook;
  m.levels[5] = std::numeric_limits<float>::quiet_NaN();
  expect_refused(m, "levels[5] must be a finite half-precision number");
  m.levels.pop_back();
  expect_refused(m, "levels has 31 values, needs 32");
  m = codebook;
  m.bits = 3;
  expect_refused(m, "a codebook is of 2 bits, not of 3");
  m = codebook;
  m.scales = good.scales;
  expect_refused(m, "scales or zeros beside a codebook");
}

TEST(PackDense8Test, RoundsToWithinHalfAStep) {
  for (const float deviation : {1e-20f, 1e-6f, 0.02f, 1.0f, 1e6f, 1e30f}) {
    for (const int64_t cols : {int64_t{7}, int64_t{172}, int64_t{576}}) {
      Matrix m(19, cols);
      const auto values = testing::RandomFloats(m.size(), 1, deviation);
      std::copy(values.begin(), values.end(), m.data());
      ASSERT_OK_AND_ASSIGN(const PackedMatrix packed, PackedMatrix::PackDense8(m));
      EXPECT_EQ(packed.bits(), 8);
      const Matrix dense = packed.Dequantize();
      const int64_t group = packed.group_size();
      for (int64_t first = 0; first < m.size(); first += group) {
        float highest = 0;
        for (int64_t i = first; i < first + group; ++i) {
          highest = std::max(highest, std::fabs(values[i]));
        }
        // Half a step, and what rounding the scale to 11 bits moves the largest value by.
        const float tolerance = highest / 127.0f * 0.5f + highest / 1024.0f;
        for (int64_t i = first; i < first + group; ++i) {
          ASSERT_NEAR(dense.data()[i], values[i], tolerance) << "deviation " << deviation;
        }
      }
    }
  }
}

TEST(PackDense8Test, ZerosAndRefusals) {
  ASSERT_OK_AND_ASSIGN(const PackedMatrix zeros, PackedMatrix::PackDense8(Matrix(3, 32)));
  const Matrix dense = zeros.Dequantize();
  for (const float value : dense.span()) EXPECT_EQ(value, 0);
  Matrix bad(2, 32);
  bad(1, 3) = std::numeric_limits<float>::infinity();
  EXPECT_THAT(PackedMatrix::PackDense8(bad),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("value 35 is not finite")));
}

}  // namespace
}  // namespace walsh::kernels
