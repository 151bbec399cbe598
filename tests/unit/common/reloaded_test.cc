#include "common/reloaded.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::walsh::testing::HasCode;

TEST(ReloadedTest, TakesWhatLoadsAndKeepsItOverWhatDoesNot) {
  absl::StatusOr<int> in_file = 1;
  std::vector<int> changes;
  ASSERT_OK_AND_ASSIGN(const auto value,
                       Reloaded<int>::Open({.name = "test",
                                            .load = [&] { return in_file; },
                                            .on_change = [&](int v) { changes.push_back(v); }}));
  const auto first = value->Get();
  EXPECT_EQ(*first, 1);
  value->Poll();
  EXPECT_EQ(value->Get(), first) << "an equal value is the same one";
  in_file = absl::InvalidArgumentError("bad");
  value->Poll();
  EXPECT_EQ(value->Get(), first);
  in_file = 2;
  value->Poll();
  EXPECT_EQ(*value->Get(), 2);
  EXPECT_EQ(*first, 1) << "who has the old one may go on with it";
  EXPECT_EQ(changes, (std::vector<int>{1, 2}));
}

TEST(ReloadedTest, TheFirstOneMustBeGood) {
  EXPECT_THAT(
      Reloaded<int>::Open({.name = "test", .load = [] { return absl::NotFoundError("no file"); }}),
      HasCode(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace walsh
