#include "worker/interop/gguf_blocks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/interop/export_golden.h"

namespace walsh::interop {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using walsh::testing::StatusIs;

constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

MATCHER_P(HoldsType, type, "") { return arg.ok() && *arg == type; }

std::string Blocks(const QuantizedMatrix& matrix, StorageType type) {
  std::string blocks;
  std::vector<std::byte> row;
  for (int64_t r = 0; r < matrix.rows; ++r) {
    EncodeGgufRow(matrix, type, r, row);
    blocks.append(reinterpret_cast<const char*>(row.data()), row.size());
  }
  return blocks;
}

// Blocks that the Python package gguf dequantizes to exactly these weights.
TEST(GgufBlocksTest, AreWhatGgufReads) {
  std::set<StorageType> types;
  for (const ExportGolden& golden : ReadExportGoldens()) {
    if (golden.blocks.empty()) continue;
    ASSERT_OK_AND_ASSIGN(const StorageType type, GgufTypeOf(golden.matrix));
    EXPECT_EQ(Info(type).ggml_id, golden.ggml_type);
    EXPECT_EQ(Blocks(golden.matrix, type), golden.blocks) << Info(type).name;
    std::vector<float> weights(golden.matrix.codes.size());
    Dequantize(type, std::as_bytes(std::span(golden.blocks)), weights);
    const Matrix expected = Dequantize(golden.matrix);
    EXPECT_TRUE(std::equal(weights.begin(), weights.end(), expected.data())) << Info(type).name;
    types.insert(type);
  }
  EXPECT_EQ(types, (std::set{StorageType::kQ4_0, StorageType::kQ4_1, StorageType::kQ8_0}));
}

QuantizedMatrix Small(int bits, int64_t group_size, float scale, uint8_t zero) {
  QuantizedMatrix m{.rows = 32, .cols = 64, .bits = bits, .group_size = group_size};
  m.codes.assign(32 * 64, 1);
  m.scales.assign(static_cast<size_t>(32 * m.groups()), scale);
  m.zeros.assign(static_cast<size_t>(32 * m.groups()), zero);
  return m;
}

TEST(GgufBlocksTest, RefusesAMinimumThatHalfPrecisionDoesNotHold) {
  const float scale = HalfToFloat(0x2c01);  // 1025 · 2^-14: times 3 it has 12 significant bits
  QuantizedMatrix m = Small(4, 32, scale, 4);
  EXPECT_THAT(GgufTypeOf(m), HoldsType(StorageType::kQ4_1));
  m.zeros[5] = 3;
  EXPECT_THAT(GgufTypeOf(m), StatusIs(kPrecondition, AllOf(HasSubstr("which does not hold -0.0625"),
                                                           HasSubstr("x 3 (output 2, group 1)"),
                                                           HasSubstr("symmetric"))));
  // Nor one that is too large.
  EXPECT_THAT(GgufTypeOf(Small(4, 32, 8192.0f, 15)), StatusIs(kPrecondition, HasSubstr("x 15")));
}

TEST(GgufBlocksTest, RefusesStepsThatAByteDoesNotHold) {
  QuantizedMatrix m = Small(8, 64, 0.5f, 120);
  EXPECT_THAT(GgufTypeOf(m), HoldsType(StorageType::kQ8_0));
  m.codes[70] = 248;
  EXPECT_THAT(GgufTypeOf(m), StatusIs(kPrecondition, HasSubstr("output 1, input 6 is 128")));
}

TEST(GgufBlocksTest, RefusesOtherWidthsAndGroups) {
  EXPECT_THAT(GgufTypeOf(Small(2, 32, 0.5f, 1)), StatusIs(kPrecondition, HasSubstr("2 bits")));
  EXPECT_THAT(GgufTypeOf(Small(3, 32, 0.5f, 1)), StatusIs(kPrecondition, HasSubstr("3 bits")));
  EXPECT_THAT(GgufTypeOf(Small(4, 16, 0.5f, 8)),
              StatusIs(kPrecondition, HasSubstr("groups of 16 inputs")));
}

}  // namespace
}  // namespace walsh::interop
