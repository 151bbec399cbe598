#include "common/kv_cache_dtype.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

TEST(ParseKvCacheDtypeTest, TakesItsFourForms) {
  EXPECT_EQ(ParseKvCacheDtype("auto").value(), KvCacheDtype::kAuto);
  EXPECT_EQ(ParseKvCacheDtype("bf16").value(), KvCacheDtype::kBf16);
  EXPECT_EQ(ParseKvCacheDtype("int8").value(), KvCacheDtype::kInt8);
  EXPECT_EQ(ParseKvCacheDtype("int4").value(), KvCacheDtype::kInt4);
}

TEST(ParseKvCacheDtypeTest, RefusesEverythingElseByName) {
  for (const char* text : {"", "int2", "INT8", "8", "fp8"}) {
    EXPECT_THAT(ParseKvCacheDtype(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("--kv-cache-dtype '" + std::string(text) +
                                   "' is not auto, bf16, int8 or int4")));
  }
}

}  // namespace
}  // namespace walsh
