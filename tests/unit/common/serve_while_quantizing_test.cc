#include "common/serve_while_quantizing.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

TEST(ParseServeWhileQuantizingTest, TakesItsThreeForms) {
  EXPECT_EQ(ParseServeWhileQuantizing("exclusive").value(), ServeWhileQuantizing::kExclusive);
  EXPECT_EQ(ParseServeWhileQuantizing("share").value(), ServeWhileQuantizing::kShare);
  EXPECT_EQ(ParseServeWhileQuantizing("preempt").value(), ServeWhileQuantizing::kPreempt);
}

TEST(ParseServeWhileQuantizingTest, RefusesEverythingElseByName) {
  for (const char* text : {"", "Share", "share ", "both"}) {
    EXPECT_THAT(ParseServeWhileQuantizing(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("--serve-while-quantizing '" + std::string(text) +
                                   "' is not exclusive, share or preempt")));
  }
}

}  // namespace
}  // namespace walsh
