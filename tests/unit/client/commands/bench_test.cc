#include "client/commands/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/testing/status_matchers.h"

namespace walsh::client {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::walsh::testing::StatusIs;

TEST(MakeLoadOptionsTest, DefaultsFollowTheLoad) {
  ASSERT_OK_AND_ASSIGN(const LoadOptions one, MakeLoadOptions({}));
  EXPECT_EQ(one.concurrency, 1);
  EXPECT_EQ(one.n_requests, 16);
  EXPECT_EQ(one.rate, 0);
  ASSERT_OK_AND_ASSIGN(const LoadOptions many, MakeLoadOptions({.concurrency = 64}));
  EXPECT_EQ(many.n_requests, 256);
  ASSERT_OK_AND_ASSIGN(const LoadOptions open, MakeLoadOptions({.rate = 5, .seed = 9}));
  EXPECT_EQ(open.concurrency, 256);
  EXPECT_EQ(open.rate, 5);
  EXPECT_EQ(open.seed, 9u);
  ASSERT_OK_AND_ASSIGN(const LoadOptions timed, MakeLoadOptions({.seconds = 30}));
  EXPECT_EQ(timed.duration_max, absl::Seconds(30));
  EXPECT_GT(timed.n_requests, 100'000);
  ASSERT_OK_AND_ASSIGN(const LoadOptions both, MakeLoadOptions({.requests = 7, .seconds = 30}));
  EXPECT_EQ(both.n_requests, 7);
}

TEST(MakeLoadOptionsTest, PromptsMustDiffer) {
  EXPECT_THAT(MakeLoadOptions({.prompt_tokens = 32, .shared_tokens = 32}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("--shared-prefix is 32, less than the 32 of --prompt-tokens")));
}

TEST(MakeLoadOptionsTest, NumbersAreFinite) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(MakeLoadOptions({.rate = nan}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--rate")));
  EXPECT_THAT(MakeLoadOptions({.seconds = nan}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--duration")));
}

TEST(BenchPromptTest, PromptsShareTheirBeginningAndNothingElse) {
  const BenchFlags flags{.prompt_tokens = 40, .shared_tokens = 16, .seed = 5};
  const std::vector<int32_t> alphabet = {3, 5, 7, 11, 13, 17, 19, 23};
  const std::vector<int32_t> first = BenchPrompt(flags, alphabet, 0);
  const std::vector<int32_t> second = BenchPrompt(flags, alphabet, 1);
  ASSERT_THAT(first, SizeIs(40));
  ASSERT_THAT(second, SizeIs(40));
  EXPECT_TRUE(std::equal(first.begin(), first.begin() + 16, second.begin()));
  EXPECT_FALSE(std::equal(first.begin() + 16, first.end(), second.begin() + 16));
  EXPECT_EQ(BenchPrompt(flags, alphabet, 1), second);
  for (const int32_t token : first) {
    EXPECT_NE(std::find(alphabet.begin(), alphabet.end(), token), alphabet.end());
  }
}

}  // namespace
}  // namespace walsh::client
