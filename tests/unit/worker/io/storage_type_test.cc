#include "worker/io/storage_type.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "tests/testing/golden.h"

namespace walsh {
namespace {

uint32_t Take32(std::string_view& bytes) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data(), sizeof(value));
  bytes.remove_prefix(sizeof(value));
  return value;
}

// Blocks and floats by the Python package gguf; equal to the last bit.
TEST(StorageTypeTest, DequantizesAsGgufDoes) {
  const std::string golden = testing::GoldenFile("io/block_formats.bin");
  ASSERT_FALSE(golden.empty());
  std::string_view bytes = golden;
  std::set<uint32_t> seen;
  while (!bytes.empty()) {
    const uint32_t ggml_id = Take32(bytes);
    const uint32_t n_bytes = Take32(bytes);
    const uint32_t n_values = Take32(bytes);
    const auto type = StorageTypeFromGgml(ggml_id);
    ASSERT_TRUE(type.has_value()) << ggml_id;
    std::vector<float> expected(n_values);
    std::memcpy(expected.data(), bytes.data() + n_bytes, n_values * sizeof(float));
    std::vector<float> values(n_values);
    Dequantize(*type, std::as_bytes(std::span(bytes.data(), n_bytes)), values);
    for (uint32_t i = 0; i < n_values; ++i) {
      ASSERT_EQ(values[i], expected[i]) << Info(*type).name << " element " << i;
    }
    bytes.remove_prefix(n_bytes + n_values * sizeof(float));
    seen.insert(ggml_id);
  }
  EXPECT_EQ(seen.size(), 13u) << "a format has no golden blocks";
}

TEST(StorageTypeTest, KnowsWhatItDoesNotRead) {
  EXPECT_FALSE(StorageTypeFromGgml(16).has_value());
  EXPECT_EQ(GgmlTypeName(16), "IQ2_XXS");
  EXPECT_EQ(GgmlTypeName(14), "Q6_K");
  EXPECT_EQ(GgmlTypeName(30), "BF16");
  EXPECT_EQ(GgmlTypeName(4'000'000'000u), "unknown");
  for (uint32_t id = 0; id < 40; ++id) {
    const auto type = StorageTypeFromGgml(id);
    EXPECT_TRUE(!type.has_value() || Info(*type).name == GgmlTypeName(id)) << id;
  }
}

}  // namespace
}  // namespace walsh
