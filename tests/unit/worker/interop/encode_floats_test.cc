#include "worker/interop/encode_floats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "tests/testing/status_matchers.h"

namespace walsh::interop {
namespace {

using ::testing::HasSubstr;
using walsh::testing::StatusIs;

template <typename T>
std::vector<T> As(const std::vector<std::byte>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

TEST(EncodeFloatsTest, RoundsToTheType) {
  const std::vector<float> values = {1.0f, -0.1f, 65504.0f};
  ASSERT_OK_AND_ASSIGN(const auto f32, EncodeFloats("w", StorageType::kF32, values));
  EXPECT_EQ(As<float>(f32), values);
  ASSERT_OK_AND_ASSIGN(const auto f16, EncodeFloats("w", StorageType::kF16, values));
  EXPECT_EQ(As<uint16_t>(f16), (std::vector<uint16_t>{0x3c00, 0xae66, 0x7bff}));
  ASSERT_OK_AND_ASSIGN(const auto bf16, EncodeFloats("w", StorageType::kBf16, values));
  EXPECT_EQ(As<uint16_t>(bf16), (std::vector<uint16_t>{0x3f80, 0xbdcd, 0x4780}));
}

TEST(EncodeFloatsTest, RefusesWhatBecomesInfinite) {
  const std::vector<float> values = {1.0f, -70000.0f};
  EXPECT_THAT(
      EncodeFloats("model.norm.weight", StorageType::kF16, values),
      StatusIs(absl::StatusCode::kFailedPrecondition,
               HasSubstr("tensor 'model.norm.weight' holds -70000, which F16 cannot hold")));
  EXPECT_OK(EncodeFloats("model.norm.weight", StorageType::kBf16, values));
}

}  // namespace
}  // namespace walsh::interop
