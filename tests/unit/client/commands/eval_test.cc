#include "client/commands/eval.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/testing/status_matchers.h"

namespace walsh::client {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

TEST(MakeEvalRequestTest, CarriesEveryFlag) {
  EvalFlags flags;
  flags.model = "models/demo";
  flags.text = "/texts/wiki.test.raw";
  flags.text_format = "wikitext";
  flags.window = 512;
  flags.stride = 256;
  flags.max_windows = 9;
  flags.reference = "/models/original";
  flags.tasks = {"/eval/piqa.jsonl", "t.jsonl"};
  flags.limit = 100;
  flags.no_bos = true;
  ASSERT_OK_AND_ASSIGN(const v1::EvaluateModelRequest request, MakeEvalRequest(flags));
  EXPECT_EQ(request.model(), "demo");
  EXPECT_EQ(request.text().uri(), "/texts/wiki.test.raw");
  EXPECT_EQ(request.text().format(), v1::TextEvaluation::WIKITEXT);
  EXPECT_EQ(request.text().window(), 512);
  EXPECT_EQ(request.text().stride(), 256);
  EXPECT_EQ(request.text().max_windows(), 9);
  EXPECT_EQ(request.text().reference(), "/models/original");
  ASSERT_EQ(request.tasks_size(), 2);
  EXPECT_EQ(request.tasks(1).uri(), std::filesystem::current_path().string() + "/t.jsonl");
  EXPECT_EQ(request.tasks(1).limit(), 100);
  EXPECT_TRUE(request.skip_bos());
}

TEST(MakeEvalRequestTest, DefaultsAreTheServices) {
  EvalFlags flags;
  flags.model = "demo";
  flags.tasks = {"/t.jsonl"};
  ASSERT_OK_AND_ASSIGN(const v1::EvaluateModelRequest request, MakeEvalRequest(flags));
  EXPECT_FALSE(request.has_text());
  EXPECT_EQ(request.tasks(0).limit(), 0);
  EXPECT_FALSE(request.skip_bos());
}

// The job's source is looked up by the command, not here.
TEST(MakeEvalRequestTest, TheJobsSourceIsNoPath) {
  EvalFlags flags;
  flags.text = "/t.txt";
  flags.reference = "source";
  ASSERT_OK_AND_ASSIGN(v1::EvaluateModelRequest request, MakeEvalRequest(flags));
  EXPECT_EQ(request.text().reference(), "");
  flags.reference = "./source";
  ASSERT_OK_AND_ASSIGN(request, MakeEvalRequest(flags));
  EXPECT_EQ(request.text().reference(), std::filesystem::current_path().string() + "/source");
}

TEST(MakeEvalRequestTest, RefusesWhatMeansNothing) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(MakeEvalRequest({.model = "demo"}),
              StatusIs(invalid, HasSubstr("--text or --tasks")));
  EvalFlags flags;
  flags.tasks = {"/t.jsonl"};
  flags.window = 512;
  EXPECT_THAT(MakeEvalRequest(flags), StatusIs(invalid, HasSubstr("about a --text")));
  flags.window = 0;
  flags.tasks = {"/\xff"};
  EXPECT_THAT(MakeEvalRequest(flags), HasCode(invalid));
}

}  // namespace
}  // namespace walsh::client
