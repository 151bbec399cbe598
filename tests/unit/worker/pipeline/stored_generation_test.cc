#include "worker/pipeline/stored_generation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"

namespace walsh::pipeline {
namespace {

using ::walsh::testing::HasCode;

// As whoever writes to the store could.
std::string Signed(const std::string& body) { return absl::StrCat(Sha256Hex(body), "\n", body); }

TEST(StoredGenerationTest, IsReadAsItWasWritten) {
  const StoredGeneration stored{
      .fencing_token = std::numeric_limits<int64_t>::max(),
      .generation = {.manifest = "m", .objects = {{.sha256 = "abc", .size_bytes = 7}}}};
  const absl::StatusOr<StoredGeneration> read = FromText(ToText(stored));
  ASSERT_OK(read.status());
  EXPECT_EQ(read->fencing_token, stored.fencing_token);
  EXPECT_EQ(read->generation.manifest, "m");
  ASSERT_EQ(read->generation.objects.size(), 1u);
  EXPECT_EQ(read->generation.objects[0].size_bytes, 7);
}

TEST(StoredGenerationTest, RefusesWhatItDidNotWrite) {
  const auto body = [](const std::string& fencing_token, const std::string& size_bytes) {
    return absl::StrCat(R"({"fencing_token":)", fencing_token, R"(,"manifest":"","objects":[["a",)",
                        size_bytes, "]]}");
  };
  ASSERT_OK(FromText(Signed(body("1", "2"))).status());
  EXPECT_THAT(FromText(body("1", "2")), HasCode(absl::StatusCode::kDataLoss));
  for (const char* number : {"18446744073709551615", "1e300", "1.5", "null"}) {
    EXPECT_THAT(FromText(Signed(body(number, "2"))), HasCode(absl::StatusCode::kDataLoss))
        << number;
    EXPECT_THAT(FromText(Signed(body("1", number))), HasCode(absl::StatusCode::kDataLoss))
        << number;
  }
  EXPECT_THAT(FromText(Signed("[")), HasCode(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace walsh::pipeline
