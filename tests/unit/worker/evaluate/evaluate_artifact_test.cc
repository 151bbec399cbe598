// An artifact of a real job, evaluated by itself: what the job measured, measured again.
#include "worker/evaluate/evaluate_artifact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/calibrate/token_windows.h"
#include "worker/io/checkpoint.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::evaluate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

absl::Status Ignore(const std::string&, double) { return absl::OkStatus(); }

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
  EXPECT_THAT(report.warnings, IsEmpty());
}

// The same for rows that are joined, windows that overlap, tasks, and without BOS.
TEST_F(EvaluateArtifactTest, MeasuresWhatTheJobMeasuredInEveryWay) {
  const std::string rows = Write("rows.txt", "The waves\n \n" + std::string(300, 'a') +
                                                 "\ncame in from the sea\nand went out again\n" +
                                                 std::string(300, 'b') + "\n");
  pipeline::JobSpec job = TinyJob();
  job.quantizer.bits = 3;
  job.evaluation_path = rows;
  job.evaluation_joins_rows = true;
  job.evaluation_length = 64;
  job.evaluation_stride = 24;
  job.evaluation_skips_bos = true;
  job.tasks = {{.path = Write("last.jsonl", R"({"context": "The waves", "continuation": "of"})")},
               {.path = Write("q.jsonl", R"({"query": "a", "choices": ["b", "c"], "gold": 1})"
                                         "\n"
                                         R"({"query": "d", "choices": ["e", "f"], "gold": 1})"),
                .name = "/asked/choice.jsonl"}};
  job.output_directory = directory_ / "second";
  ASSERT_OK_AND_ASSIGN(const pipeline::JobReport made, Run(job));
  spec_ = {.artifact_directory = job.output_directory,
           .text = TextSpec{.path = rows,
                            .joins_rows = true,
                            .window = 64,
                            .stride = 24,
                            .max_windows = 4,
                            .reference_path = directory_ / "model"},
           .tasks = job.tasks,
           .skip_bos = true};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport report, Evaluate());
  EXPECT_EQ(report.text->windows, 4);
  EXPECT_EQ(report.text->tokens, 63 + 3 * 24);
  EXPECT_EQ(made.evaluation_tokens, 63 + 3 * 24);
  EXPECT_NEAR(report.text->perplexity.mean, made.perplexity_after, 1e-9 * made.perplexity_after);
  EXPECT_NEAR(report.text->reference_perplexity, made.perplexity_before,
              1e-9 * made.perplexity_before);
  EXPECT_NEAR(report.text->kl_divergence.mean, made.kl_divergence, 1e-9);
  EXPECT_NEAR(report.text->top1_agreement, made.top1_agreement, 1e-12);
  ASSERT_OK_AND_ASSIGN(const std::string walsh_json,
                       ReadFile(job.output_directory + "/walsh.json", 1 << 24));
  const auto quality = nlohmann::json::parse(walsh_json)["quality"];
  EXPECT_EQ(quality["fingerprint"], report.text->fingerprint);
  EXPECT_EQ(quality["stride"], 24);
  ASSERT_EQ(report.tasks.size(), 2u);
  ASSERT_EQ(made.tasks.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const TaskReport& task = report.tasks[i];
    const TaskReport& after = made.tasks[i].after;
    EXPECT_EQ(after.name, task.name);
    EXPECT_EQ(after.items, task.items);
    EXPECT_EQ(after.score.tokens, task.score.tokens);
    EXPECT_EQ(after.score.accuracy.mean, task.score.accuracy.mean);
    EXPECT_EQ(after.score.accuracy.standard_error, task.score.accuracy.standard_error);
    EXPECT_EQ(made.tasks[i].before.score.tokens, task.score.tokens);
    EXPECT_EQ(quality["tasks"][i]["after"]["accuracy"], task.score.accuracy.mean);
  }
  EXPECT_NEAR(made.tasks[0].after.score.perplexity->mean, report.tasks[0].score.perplexity->mean,
              1e-9);
  EXPECT_EQ(made.tasks[1].after.name, "choice");
  EXPECT_TRUE(made.tasks[1].after.score.accuracy_norm.has_value());
}

TEST_F(EvaluateArtifactTest, TheFingerprintIsThatOfTheWindows) {
  spec_.text = {.path = directory_ / "eval.txt", .window = 64, .stride = 16, .max_windows = 5};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport report, Evaluate());
  ASSERT_OK_AND_ASSIGN(const auto model, Checkpoint::Open(directory_ / "model"));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(model->tokenizer()));
  ASSERT_OK_AND_ASSIGN(const std::string contents, ReadFile(directory_ / "eval.txt", 1 << 24));
  ASSERT_OK_AND_ASSIGN(
      const std::vector<int32_t> ids,
      tokenizer->Encode(contents, {.add_special_tokens = true, .parse_special_tokens = false}));
  calibrate::TokenWindows windows;
  windows.length = 64;
  for (int64_t begin = 0; begin < 5 * 16; begin += 16) {
    windows.ids.insert(windows.ids.end(), ids.begin() + begin, ids.begin() + begin + 64);
  }
  EXPECT_EQ(report.text->fingerprint, calibrate::Fingerprint(windows));
}

TEST_F(EvaluateArtifactTest, SaysWhatWasNotEvaluatedAsAsked) {
  spec_.text = {.path = directory_ / "eval.txt", .window = 128, .max_windows = 8000};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport fewer, Evaluate());
  EXPECT_LT(fewer.text->windows, 8000);
  EXPECT_THAT(fewer.warnings, ElementsAre(HasSubstr("windows instead of 8000: the text has ")));
  spec_.text = {.path = Write("short.txt", "The waves came in from the sea and went out again."),
                .window = 256};
  ASSERT_OK_AND_ASSIGN(const EvaluationReport shorter, Evaluate());
  EXPECT_THAT(shorter.warnings, ElementsAre(HasSubstr("fewer than a window of 256")));
}

// Asked before any work, with a figure that a longer text and a longer item raise.
TEST_F(EvaluateArtifactTest, AsksForItsMemoryFirst) {
  int64_t n_bytes = 0;
  bool is_asked = false;
  spec_.check_memory = [&](int64_t bytes_needed) {
    n_bytes = bytes_needed;
    is_asked = true;
    return absl::OkStatus();
  };
  const auto before_work = [&](const std::string&, double fraction) {
    EXPECT_TRUE(is_asked || fraction == 0);
    return absl::OkStatus();
  };
  spec_.text = {.path = directory_ / "eval.txt", .window = 128, .max_windows = 1};
  ASSERT_OK(Evaluate(before_work));
  const int64_t small = n_bytes;
  EXPECT_GT(small, 0);
  spec_.text->max_windows = 4;
  ASSERT_OK(Evaluate(before_work));
  EXPECT_GT(n_bytes, small);
  spec_.text.reset();
  const std::string text(200, 'x');
  spec_.tasks.push_back({.path = Write("a.jsonl", R"({"context": "a", "continuation": "b"})")});
  ASSERT_OK(Evaluate(before_work));
  const int64_t short_item = n_bytes;
  spec_.tasks[0].path = Write("b.jsonl", R"({"context": ")" + text + R"(", "continuation": "b"})");
  ASSERT_OK(Evaluate(before_work));
  EXPECT_GT(n_bytes, short_item);
  spec_.check_memory = [](int64_t) { return absl::FailedPreconditionError("too much"); };
  EXPECT_THAT(Evaluate([](const std::string&, double fraction) {
                EXPECT_EQ(fraction, 0);
                return absl::OkStatus();
              }),
              StatusIs(absl::StatusCode::kFailedPrecondition, "too much"));
}

TEST_F(EvaluateArtifactTest, TheFilesOfAllTasksAreBounded) {
  const std::string line = R"({"context": "a", "continuation": "b"})"
                           "\n";
  const std::string half =
      Write("half.jsonl", line + std::string(limits::kTaskFileBytesMax / 2, ' '));
  spec_.tasks = {{.path = half, .limit = 1}, {.path = half, .limit = 1}};
  EXPECT_THAT(Evaluate(), StatusIs(absl::StatusCode::kInvalidArgument,
                                   HasSubstr("bytes together, at most 67108864 are taken")));
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
  // As many tokens, but what two of them stand for is exchanged.
  testing::TinyModel({}).WriteHf(directory_ / "other");
  ASSERT_OK_AND_ASSIGN(std::string tokenizer,
                       ReadFile(directory_ / "other/tokenizer.json", 1 << 24));
  auto json = nlohmann::json::parse(tokenizer);
  std::swap(json["model"]["vocab"]["e"], json["model"]["vocab"]["Q"]);
  ASSERT_OK(PublishFile(directory_ / "other/tokenizer.json", json.dump()));
  spec_.text->reference_path = directory_ / "other";
  EXPECT_THAT(
      Evaluate(no_work),
      StatusIs(invalid, HasSubstr("text: the reference has another tokenizer: its token ")));
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
              StatusIs(absl::StatusCode::kCancelled, "stop"));
  // A text that is read or encoded is left at once, too, and the reason is the caller's alone.
  EXPECT_THAT(Evaluate([](const std::string& step, double) {
                return step == "text" ? absl::UnavailableError("stop") : absl::OkStatus();
              }),
              StatusIs(absl::StatusCode::kUnavailable, "stop"));
}

TEST_F(EvaluateArtifactTest, WhatIsAboutATaskNamesIt) {
  spec_.tasks.push_back({.path = Write("long.jsonl", R"({"context": "a", "continuation": ")" +
                                                         std::string(2000, 'x') + R"("})")});
  EXPECT_THAT(Evaluate(), StatusIs(absl::StatusCode::kInvalidArgument,
                                   HasSubstr("task 'long': item 0: a continuation has ")));
}

}  // namespace
}  // namespace walsh::evaluate
