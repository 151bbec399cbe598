#include "worker/io/gptq_packing.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>

#include "tests/testing/golden.h"
#include "tests/testing/status_matchers.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using walsh::testing::StatusIs;

template <typename T>
std::vector<T> Take(std::string_view& bytes, int64_t n) {
  std::vector<T> out(static_cast<size_t>(n));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  bytes.remove_prefix(out.size() * sizeof(T));
  return out;
}

// Tensors packed by numpy, bit by bit; equal to the last bit, both ways.
TEST(GptqPackingTest, PacksAsNumpyDoes) {
  const std::string golden = testing::GoldenFile("io/gptq_packing.bin");
  ASSERT_FALSE(golden.empty());
  std::string_view bytes = golden;
  std::vector<int> widths;
  while (!bytes.empty()) {
    const std::vector<uint32_t> head = Take<uint32_t>(bytes, 4);
    QuantizedMatrix m;
    m.bits = static_cast<int>(head[0]);
    m.rows = head[1];
    m.cols = head[2];
    m.group_size = head[3];
    m.codes = Take<uint8_t>(bytes, m.rows * m.cols);
    m.zeros = Take<uint8_t>(bytes, m.rows * m.groups());
    for (const uint16_t scale : Take<uint16_t>(bytes, m.rows * m.groups())) {
      m.scales.push_back(HalfToFloat(scale));
    }
    const GptqShape shape = {
        .rows = m.rows, .cols = m.cols, .bits = m.bits, .group_size = m.group_size};
    const auto qweight = Take<uint32_t>(bytes, shape.weight_words() * m.rows);
    const auto qzeros = Take<uint32_t>(bytes, m.groups() * shape.zero_words());
    const auto scales = Take<uint16_t>(bytes, m.groups() * m.rows);
    const auto g_idx = Take<int32_t>(bytes, m.cols);

    ASSERT_OK_AND_ASSIGN(const GptqTensors packed, PackGptq(m));
    EXPECT_EQ(packed.qweight, qweight) << m.bits;
    EXPECT_EQ(packed.qzeros, qzeros) << m.bits;
    EXPECT_EQ(packed.scales, scales) << m.bits;
    EXPECT_EQ(packed.g_idx, g_idx) << m.bits;

    ASSERT_OK_AND_ASSIGN(const QuantizedMatrix unpacked, UnpackGptq(packed, shape));
    EXPECT_EQ(unpacked.codes, m.codes) << m.bits;
    EXPECT_EQ(unpacked.zeros, m.zeros) << m.bits;
    EXPECT_EQ(unpacked.scales, m.scales) << m.bits;
    widths.push_back(m.bits);
  }
  EXPECT_EQ(widths, (std::vector<int>{2, 3, 4, 8}));
}

// What GPTQ has no tensors for keeps its codes as they are there.
TEST(GptqPackingTest, FloatZerosAndCodebooksComeBack) {
  QuantizedMatrix m;
  m.rows = 64;
  m.cols = 96;
  m.bits = 2;
  m.group_size = 32;
  for (int64_t i = 0; i < m.rows * m.cols; ++i) m.codes.push_back(static_cast<uint8_t>(i * 7 % 4));
  const int64_t n_groups = m.rows * m.groups();
  QuantizedMatrix gptq = m, float_zero = m, codebook = m;
  for (int64_t i = 0; i < n_groups; ++i) {
    gptq.scales.push_back(0.5f + static_cast<float>(i) / 256);
    gptq.zeros.push_back(static_cast<uint8_t>(i % 4));
    float_zero.float_zeros.push_back(static_cast<float>(i) / 4 - 20);
    for (int64_t k = 0; k < 4; ++k) codebook.levels.push_back(static_cast<float>(4 * i + k) / 8);
  }
  float_zero.scales = gptq.scales;
  ASSERT_OK_AND_ASSIGN(const GptqTensors plain, PackGptq(gptq));
  for (const QuantizedMatrix& matrix : {gptq, float_zero, codebook}) {
    ASSERT_OK_AND_ASSIGN(const GptqTensors packed, PackGptq(matrix));
    EXPECT_EQ(packed.qweight, plain.qweight);
    EXPECT_EQ(packed.g_idx, plain.g_idx);
    EXPECT_EQ(packed.qzeros.empty(), matrix.zeros.empty());
    ASSERT_OK_AND_ASSIGN(const QuantizedMatrix unpacked, UnpackGptq(packed, ShapeOf(matrix)));
    EXPECT_EQ(unpacked.codes, matrix.codes);
    EXPECT_EQ(unpacked.scales, matrix.scales);
    EXPECT_EQ(unpacked.zeros, matrix.zeros);
    EXPECT_EQ(unpacked.float_zeros, matrix.float_zeros);
    EXPECT_EQ(unpacked.levels, matrix.levels);
  }
  // [groups, out, 4]: the levels of group 1 of output 2.
  ASSERT_OK_AND_ASSIGN(GptqTensors levels, PackGptq(codebook));
  EXPECT_EQ(HalfToFloat(levels.levels[(1 * 64 + 2) * 4 + 3]), codebook.levels[(2 * 3 + 1) * 4 + 3]);

  levels.levels[9] = 0x7c00;
  EXPECT_THAT(UnpackGptq(levels, ShapeOf(codebook)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the level at [0, 9] is inf")));
  ASSERT_OK_AND_ASSIGN(GptqTensors zeros, PackGptq(float_zero));
  zeros.zeros[65] = 0x7e00;
  EXPECT_THAT(UnpackGptq(zeros, ShapeOf(float_zero)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the zero at [1, 1] is nan")));
  codebook.levels[0] = 0.1f;
  EXPECT_THAT(PackGptq(codebook), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("the level of output 0, group 0 is 0.1")));
  codebook.levels.pop_back();
  EXPECT_THAT(PackGptq(codebook),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("767 levels")));
  float_zero.zeros = gptq.zeros;
  EXPECT_THAT(PackGptq(float_zero),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("384 zeros")));
}

QuantizedMatrix Small(int bits, int64_t group_size) {
  QuantizedMatrix m;
  m.rows = 32;
  m.cols = 64;
  m.bits = bits;
  m.group_size = group_size;
  m.codes.assign(32 * 64, 1);
  m.scales.assign(static_cast<size_t>(32 * m.groups()), 0.5f);
  m.zeros.assign(static_cast<size_t>(32 * m.groups()), 1);
  return m;
}

TEST(GptqPackingTest, StoresTheZeroItself) {
  QuantizedMatrix m = Small(4, 64);
  m.zeros.assign(32, 0);
  ASSERT_OK_AND_ASSIGN(const GptqTensors zero, PackGptq(m));
  EXPECT_EQ(zero.qzeros, std::vector<uint32_t>(4, 0u));  // version 1 would hold 0xffffffff
  m.zeros.assign(32, 8);
  ASSERT_OK_AND_ASSIGN(const GptqTensors eight, PackGptq(m));
  EXPECT_EQ(eight.qzeros, std::vector<uint32_t>(4, 0x88888888u));
}

TEST(GptqPackingTest, RefusesWhatDoesNotPack) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const auto expect = [](QuantizedMatrix m, const char* message) {
    EXPECT_THAT(PackGptq(m), StatusIs(kInvalid, HasSubstr(message)));
  };
  QuantizedMatrix m = Small(4, 64);
  m.bits = 5;
  expect(m, "5 bits, must be 2, 3, 4 or 8");
  m = Small(4, 64);
  m.rows = 31;
  expect(m, "a matrix of 31 outputs and 64 inputs: both must be multiples of 32");
  m = Small(4, 64);
  m.cols = 172;
  expect(m, "172 inputs");
  m = Small(4, 64);
  m.group_size = 48;
  expect(m, "groups of 48 do not divide 64 inputs");
  m = Small(4, 64);
  m.codes.pop_back();
  expect(m, "2047 codes");
  m = Small(2, 64);
  m.codes[7] = 4;
  expect(m, "a code is 4, must be below 4");
  m = Small(3, 64);
  m.zeros[7] = 8;
  expect(m, "a zero is 8, must be below 8");
  m = Small(4, 32);
  m.scales[3] = 0.1f;  // between two halves
  expect(m, "the scale of output 1, group 1 is 0.1, not a finite value of half precision");
  m.scales[3] = std::numeric_limits<float>::infinity();
  expect(m, "is inf");
}

TEST(GptqPackingTest, RefusesScalesThatAreNotFinite) {
  const QuantizedMatrix m = Small(4, 32);
  ASSERT_OK_AND_ASSIGN(GptqTensors packed, PackGptq(m));
  packed.scales[33] = 0x7e00;
  EXPECT_THAT(CheckScales(packed.scales, {.rows = 32, .cols = 64, .bits = 4, .group_size = 32}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the scale at [1, 1] is nan")));
  EXPECT_THAT(UnpackGptq(packed, {.rows = 32, .cols = 64, .bits = 4, .group_size = 32}),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the scale at [1, 1] is nan")));
}

TEST(GptqPackingTest, KeepsAnotherOrderOfInputs) {
  OrderedMatrix ordered{.matrix = Small(3, 32)};
  for (size_t i = 0; i < ordered.matrix.codes.size(); ++i) {
    ordered.matrix.codes[i] = static_cast<uint8_t>(i % 7);
  }
  ordered.matrix.zeros[1] = 4;
  // Group 0 has the odd inputs, group 1 the even ones.
  for (int32_t i = 0; i < 64; ++i) ordered.input_order.push_back(i < 32 ? 2 * i + 1 : 2 * (i - 32));
  ASSERT_OK_AND_ASSIGN(const GptqTensors packed, PackGptq(ordered));
  for (size_t input = 0; input < 64; ++input)
    EXPECT_EQ(packed.g_idx[input], input % 2 == 1 ? 0 : 1);
  const GptqShape shape{.rows = 32, .cols = 64, .bits = 3, .group_size = 32};
  ASSERT_OK_AND_ASSIGN(const OrderedMatrix unpacked, UnpackOrdered(packed, shape));
  EXPECT_EQ(unpacked.input_order, ordered.input_order);
  EXPECT_EQ(unpacked.matrix.codes, ordered.matrix.codes);
  // Column 32 is input 0, of group 1, whose zero is 4 in the first row.
  const Matrix dense = Dequantize(unpacked);
  EXPECT_EQ(dense(0, 0), 0.5f * (static_cast<float>(ordered.matrix.codes[32]) - 4.0f));
  EXPECT_EQ(dense(0, 1), 0.5f * (static_cast<float>(ordered.matrix.codes[0]) - 1.0f));
}

TEST(GptqPackingTest, RefusesAnOrderThatIsNone) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  OrderedMatrix ordered{.matrix = Small(4, 32)};
  for (int32_t i = 0; i < 64; ++i) ordered.input_order.push_back(i);
  ASSERT_OK(PackGptq(ordered));
  for (const int32_t bad : {-1, 64, 7}) {  // 7 is there already
    ordered.input_order[3] = bad;
    EXPECT_THAT(PackGptq(ordered), StatusIs(kInvalid, HasSubstr("no permutation of 64"))) << bad;
  }
  ordered.input_order.pop_back();
  EXPECT_THAT(PackGptq(ordered), StatusIs(kInvalid, HasSubstr("no permutation")));
}

}  // namespace
}  // namespace walsh
