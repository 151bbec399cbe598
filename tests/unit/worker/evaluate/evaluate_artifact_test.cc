// An artifact of a real job, evaluated by itself: what the job measured, measured again.
#include "worker/evaluate/evaluate_artifact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/pipeline/job_fixture.h"

namespace walsh::evaluate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

absl::Status Ignore(const std::string&, double) { return absl::OkStatus(); }

TEST(JoinRowsTest, KeepsNewlinesAndEmptiesBlankRows) {
  EXPECT_EQ(JoinRows(""), "");
  EXPECT_EQ(JoinRows("a\nb\n"), "a\n\n\nb\n");
  EXPECT_EQ(JoinRows(" \na\n \nb"), "\n\na\n\n\n\n\nb");
}

// What GPTQ and QuaRot evaluate on (the digest is that of the rows joined in Python).
TEST(JoinRowsTest, WikiText2) {
  WALSH_REQUIRE_DATA(path, "corpora/wiki.test.raw");
  ASSERT_OK_AND_ASSIGN(const std::string rows, ReadFile(path, 1 << 24));
  const std::string joined = JoinRows(rows);
  EXPECT_EQ(joined.size(), 1296370u);
  EXPECT_EQ(Sha256Hex(joined), "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
}

TEST(CutStridedTest, EachTokenIsPredictedOnce) {
  std::vector<int32_t> ids(10);
  std::iota(ids.begin(), ids.end(), 0);
  const StridedWindows overlapping = CutStrided(ids, 4, 2, 100);
  EXPECT_THAT(overlapping.windows.ids, ElementsAre(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9));
  // 1, 2, 3; then 4, 5; 6, 7; 8, 9.
  EXPECT_THAT(overlapping.scored_from, ElementsAre(1, 2, 2, 2));
  const StridedWindows apart = CutStrided(ids, 4, 4, 100);
  EXPECT_THAT(apart.windows.ids, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(apart.scored_from, ElementsAre(1, 1));
  EXPECT_EQ(CutStrided(ids, 4, 1, 3).windows.count(), 3);
  EXPECT_EQ(CutStrided(ids, 10, 10, 3).windows.count(), 1);
  EXPECT_EQ(CutStrided(ids, 11, 1, 3).windows.count(), 0);
}

class EvaluateArtifactTest : public testing::JobTest {
 protected:
  void SetUp() override {
    pipeline::JobSpec job = TinyJob();
    job.evaluation_path = WriteText("eval.txt", 100);
    job.quantizer.bits = 3;
    auto report = Run(job);
    ASSERT_OK(report);
    report_ = *std::move(report);
    spec_.artifact_directory = directory_ / "out";
  }

  absl::StatusOr<EvaluationReport> Evaluate(const StepProgress& progress = Ignore) {
    ThreadPool pool(2);
    return EvaluateArtifact(spec_, pool, progress);
  }
  std::string Write(const std::string& name, const std::string& contents) {
    EXPECT_OK(PublishFile(directory_ / name, contents));
    return directory_ / name;
  }

  pipeline::JobReport report_;
  EvaluationSpec spec_;
};

TEST_F(EvaluateArtifactTest, MeasuresWhatTheJobMeasured) {
  spec_.text = {.path = directory_ / "eval.txt",
                .window = 128,
                .max_windows = 4,
                .reference_path = directory_ / "model"};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport report, Evaluate());
  ASSERT_TRUE(report.text.has_value());
  const TextReport& text = *report.text;
  EXPECT_EQ(text.windows, 4);
  EXPECT_EQ(text.tokens, report_.evaluation_tokens);
  EXPECT_EQ(text.window, 128);
  EXPECT_EQ(text.stride, 128);
  EXPECT_NEAR(text.perplexity.mean, report_.perplexity_after, 1e-9 * report_.perplexity_after);
  EXPECT_NEAR(text.reference_perplexity, report_.perplexity_before,
              1e-9 * report_.perplexity_before);
  EXPECT_NEAR(text.kl_divergence.mean, report_.kl_divergence, 1e-9);
  EXPECT_NEAR(text.top1_agreement, report_.top1_agreement, 1e-12);
  const Estimate losses = MeanOf(report_.window_losses_after);
  EXPECT_NEAR(text.perplexity.standard_error, text.perplexity.mean * losses.standard_error, 1e-9);
  EXPECT_GT(text.kl_divergence.standard_error, 0);
  EXPECT_EQ(text.reference_format, report_.source_format);
  EXPECT_THAT(report.tasks, IsEmpty());
}

// Overlapping windows give each token more context; the tokens of the windows are counted once.
TEST_F(EvaluateArtifactTest, Strides) {
  spec_.text = {.path = directory_ / "eval.txt", .window = 64, .stride = 16, .max_windows = 5};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport report, Evaluate());
  EXPECT_EQ(report.text->windows, 5);
  EXPECT_EQ(report.text->tokens, 63 + 4 * 16);
  EXPECT_EQ(report.text->stride, 16);
  EXPECT_EQ(report.text->reference_format, "");
}

TEST_F(EvaluateArtifactTest, TextAndTasksTogether) {
  spec_.text = {.path = directory_ / "eval.txt", .window = 4096, .max_windows = 2};
  spec_.tasks.push_back(
      {.path = Write("last.jsonl", R"({"context": "The waves", "continuation": "of"})")});
  spec_.tasks.push_back(
      {.path = Write("q.jsonl", R"({"query": "a", "choices": ["b", "c"], "gold": 1})"
                                "\n"
                                R"({"query": "d", "choices": ["e", "f"], "gold": 1})"),
       .limit = 1});
  double last = 0;
  std::vector<std::string> steps;
  ASSERT_OK_AND_ASSIGN(const EvaluationReport report,
                       Evaluate([&](const std::string& step, double fraction) {
                         EXPECT_GE(fraction, last);
                         last = fraction;
                         if (steps.empty() || steps.back() != step) steps.push_back(step);
                         return absl::OkStatus();
                       }));
  EXPECT_THAT(steps, ElementsAre("files", "text", "last", "q"));
  EXPECT_NEAR(last, 1, 1e-9);
  ASSERT_EQ(report.tasks.size(), 2u);
  EXPECT_EQ(report.tasks[0].name, "last");
  EXPECT_TRUE(report.tasks[0].score.perplexity.has_value());
  EXPECT_EQ(report.tasks[1].items, 1);
  EXPECT_TRUE(report.tasks[1].score.accuracy_norm.has_value());
  EXPECT_THAT(report.warnings,
              ElementsAre(HasSubstr("window 4096 reduced to the model's context 256")));
}

// BOS is the tokenizer's own: a text's one window, shorter than asked for, has one token less
// without it, and so has a task's context.
TEST_F(EvaluateArtifactTest, SkipsBos) {
  spec_.text = {
      .path = Write("short.txt", "The waves came in from the sea and went out again, and again."),
      .window = 256};
  spec_.tasks.push_back(
      {.path = Write("last.jsonl", R"({"context": "The waves", "continuation": "of"})")});
  ASSERT_OK_AND_ASSIGN(const EvaluationReport with, Evaluate());
  spec_.skip_bos = true;
  ASSERT_OK_AND_ASSIGN(const EvaluationReport without, Evaluate());
  EXPECT_EQ(with.tasks[0].score.tokens - without.tasks[0].score.tokens, 1);
  ASSERT_EQ(with.text->windows, 1);
  ASSERT_LT(with.text->window, 256);
  EXPECT_EQ(with.text->tokens - without.text->tokens, 1);
}

TEST_F(EvaluateArtifactTest, BadFilesAreNamedBeforeAnyWork) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto no_work = [](const std::string&, double fraction) {
    EXPECT_EQ(fraction, 0);
    return absl::OkStatus();
  };
  spec_.text = {.path = Write("short.txt", "too short")};
  EXPECT_THAT(Evaluate(no_work), StatusIs(invalid, HasSubstr("text: has ")));
  spec_.text = {.path = directory_ / "none.txt"};
  EXPECT_THAT(Evaluate(no_work), HasCode(absl::StatusCode::kNotFound));
  spec_.text = {.path = directory_ / "eval.txt", .reference_path = directory_ / "none"};
  EXPECT_THAT(Evaluate(no_work),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("text: the reference: ")));
  testing::TinyModel({.vocab = 400}).WriteHf(directory_ / "larger");
  spec_.text->reference_path = directory_ / "larger";
  EXPECT_THAT(Evaluate(no_work), StatusIs(invalid, HasSubstr("a vocabulary of 400 tokens")));
  spec_.text = {.path = directory_ / "eval.txt"};
  spec_.tasks.push_back({.path = Write("bad.jsonl", "{}")});
  EXPECT_THAT(Evaluate(no_work), StatusIs(invalid, HasSubstr("task 1: line 1")));
}

TEST_F(EvaluateArtifactTest, StopsWhenTold) {
  spec_.text = {.path = directory_ / "eval.txt", .window = 128};
  EXPECT_THAT(Evaluate([](const std::string& step, double fraction) {
                return step == "text" && fraction > 0 ? absl::CancelledError("stop")
                                                      : absl::OkStatus();
              }),
              HasCode(absl::StatusCode::kCancelled));
}

}  // namespace
}  // namespace walsh::evaluate
