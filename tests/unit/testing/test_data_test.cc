#include "tests/testing/test_data.h"

#include <gmock/gmock.h>
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <functional>

#include "tests/testing/scoped_environment.h"

namespace walsh::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::TestPartResult;

void NeedsAFile() {
  WALSH_REQUIRE_DATA(path, "no/such/file");
  ADD_FAILURE() << "went on with " << path;
}

void NeedsTheModel() {
  WALSH_REQUIRE_SMOLLM2(path);
  ADD_FAILURE() << "went on with " << path;
}

// The one result that `test` leaves.
TestPartResult ResultOf(const std::function<void()>& test) {
  ::testing::TestPartResultArray results;
  {
    ::testing::ScopedFakeTestPartResultReporter reporter(&results);
    test();
  }
  EXPECT_EQ(results.size(), 1);
  return results.GetTestPartResult(0);
}

TEST(RequireDataTest, SkipsOrFailsWithAReasonWhereItIsMissing) {
  const ScopedEnvironment no_model("WALSH_SMOLLM2", "/no/such/model");
  for (const char* required : {"", "1"}) {
    const ScopedEnvironment require("WALSH_REQUIRE_DATA", required);
    const TestPartResult file = ResultOf(NeedsAFile);
    const TestPartResult model = ResultOf(NeedsTheModel);
    EXPECT_THAT(file.message(), HasSubstr("no/such/file"));
    EXPECT_THAT(model.message(), HasSubstr("SmolLM2"));
    for (const TestPartResult& result : {file, model}) {
      EXPECT_EQ(result.skipped(), *required == '\0');
      EXPECT_EQ(result.fatally_failed(), *required == '1');
    }
  }
}

}  // namespace
}  // namespace walsh::testing
