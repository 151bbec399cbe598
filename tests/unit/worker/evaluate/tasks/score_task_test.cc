// Scores by hand on a tiny model, and on TinyStories-656K those of transformers in float64.
#include "worker/evaluate/tasks/score_task.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/golden.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/checkpoint.h"

namespace walsh::evaluate {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;

absl::Status Ignore(double) { return absl::OkStatus(); }

TEST(MeanOfTest, StandardErrorsAreThoseOfASample) {
  EXPECT_EQ(MeanOf({}).mean, 0);
  const std::vector<double> one = {0.5};
  EXPECT_EQ(MeanOf(one).mean, 0.5);
  EXPECT_EQ(MeanOf(one).standard_error, 0);
  const std::vector<double> four = {1, 0, 0, 1};  // s² = 1/3
  EXPECT_EQ(MeanOf(four).mean, 0.5);
  EXPECT_NEAR(MeanOf(four).standard_error, std::sqrt(1.0 / 12), 1e-15);
}

class ScoreTaskTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyModel({.seed = 3, .max_position = 64}).WriteHf(directory_ / "model");
    auto checkpoint = Checkpoint::Open(directory_ / "model");
    ASSERT_OK(checkpoint);
    checkpoint_ = *std::move(checkpoint);
    auto tokenizer = Tokenizer::Create(checkpoint_->tokenizer());
    ASSERT_OK(tokenizer);
    tokenizer_ = *std::move(tokenizer);
  }

  absl::StatusOr<TaskScore> Score(const Task& task, const TaskOptions& options = {}) {
    CheckpointSource source(*checkpoint_);
    ThreadPool pool(2);
    return ScoreTask(task, *tokenizer_, source, options, pool, Ignore);
  }

  static TaskItem Item(const std::string& context, const std::vector<std::string>& choices,
                       int64_t gold) {
    TaskItem item{.contexts = {context}, .continuations = {}, .gold = gold};
    for (const std::string& choice : choices) item.continuations.push_back(" " + choice);
    return item;
  }

  testing::TempDir directory_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

// The short choice is the likelier one of a random model, for whom each token costs about as much;
// by characters the two are near each other. Whatever is gold, accuracy follows the likelihoods.
TEST_F(ScoreTaskTest, AccuracyFollowsTheLikelihoods) {
  Task task{.name = "t", .kind = TaskKind::kContinuations, .items = {}};
  for (int64_t gold : {0, 1, 0, 0}) {
    task.items.push_back(Item("The cat sat", {"on", "upon the very long wall of it"}, gold));
  }
  ASSERT_OK_AND_ASSIGN(const TaskScore score, Score(task));
  const std::vector<Likelihood>& first = score.likelihoods[0];
  ASSERT_GT(first[0].log_likelihood, first[1].log_likelihood);
  EXPECT_EQ(score.accuracy.mean, 0.75);
  EXPECT_NEAR(score.accuracy.standard_error, 0.25, 1e-12);
  const bool short_wins_by_characters = first[0].log_likelihood / 2 >= first[1].log_likelihood / 29;
  EXPECT_EQ(score.accuracy_norm->mean, short_wins_by_characters ? 0.75 : 0.25);
  EXPECT_FALSE(score.perplexity.has_value());
  EXPECT_EQ(score.truncated_items, 0);
}

TEST_F(ScoreTaskTest, OfEqualsTheFirstCounts) {
  const Task task{.name = "t",
                  .kind = TaskKind::kContinuations,
                  .items = {Item("a", {"b", "b"}, 0), Item("a", {"b", "b"}, 1)}};
  ASSERT_OK_AND_ASSIGN(const TaskScore score, Score(task));
  EXPECT_EQ(score.accuracy.mean, 0.5);
}

TEST_F(ScoreTaskTest, PerplexityIsThatOfTheContinuations) {
  const Task task{.name = "t",
                  .kind = TaskKind::kLastWord,
                  .items = {Item("one two", {"three"}, 0), Item("four", {"five six"}, 0)}};
  ASSERT_OK_AND_ASSIGN(const TaskScore score, Score(task));
  const double a = score.likelihoods[0][0].log_likelihood;
  const double b = score.likelihoods[1][0].log_likelihood;
  EXPECT_NEAR(score.perplexity->mean, std::exp(-(a + b) / 2), 1e-9 * score.perplexity->mean);
  EXPECT_NEAR(score.perplexity->standard_error, score.perplexity->mean * std::abs(a - b) / 2,
              1e-9 * score.perplexity->mean);
  EXPECT_EQ(score.accuracy.mean, 0) << "a random model does not know these words";
  EXPECT_FALSE(score.accuracy_norm.has_value());
}

TEST_F(ScoreTaskTest, CutsAContextThatIsTooLong) {
  std::string context = "x";
  while (context.size() < 400) context += " yz w";
  const Task task{.name = "t",
                  .kind = TaskKind::kContinuations,
                  .items = {Item(context, {"a", "b"}, 0), Item("short", {"a", "b"}, 0)}};
  ASSERT_OK_AND_ASSIGN(const TaskScore score, Score(task));
  EXPECT_EQ(score.truncated_items, 1);
  const Task too_long{
      .name = "t", .kind = TaskKind::kContinuations, .items = {Item("short", {context, "b"}, 0)}};
  EXPECT_THAT(Score(too_long), StatusIs(absl::StatusCode::kInvalidArgument,
                                        HasSubstr("item 0: a continuation has")));
}

// Contexts that differ, of one continuation.
TEST_F(ScoreTaskTest, ChoicesOfContexts) {
  const Task task{.name = "t",
                  .kind = TaskKind::kContexts,
                  .items = {{.contexts = {"so Ann", "so Bob"}, .continuations = {" won."}}}};
  ASSERT_OK_AND_ASSIGN(const TaskScore score, Score(task));
  ASSERT_OK_AND_ASSIGN(
      const TaskScore each,
      Score({.name = "t",
             .kind = TaskKind::kLastWord,
             .items = {Item("so Ann", {"won."}, 0), Item("so Bob", {"won."}, 0)}}));
  ASSERT_EQ(score.likelihoods[0].size(), 2u);
  for (size_t k = 0; k < 2; ++k) {
    EXPECT_NEAR(score.likelihoods[0][k].log_likelihood, each.likelihoods[k][0].log_likelihood,
                1e-5);
  }
}

// Between any two of what it encodes.
// Before the model is read: a job finds it before its work.
TEST_F(ScoreTaskTest, EncodingRefusesIdsThatTheModelDoesNotHave) {
  Task task{.name = "t", .items = {Item("one", {"two"}, 0)}};
  ModelConfig config = checkpoint_->config();
  ASSERT_OK(EncodeTask(task, *tokenizer_, config, {}, {}));
  config.vocab = 1;
  EXPECT_THAT(EncodeTask(task, *tokenizer_, config, {}, {}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("item 0: the tokenizer gives id "),
                             HasSubstr("the model has 1 embeddings"))));
}

TEST_F(ScoreTaskTest, StopsWithinAnItem) {
  const Task task{
      .name = "t", .kind = TaskKind::kContinuations, .items = {Item("a", {"b", "c", "d", "e"}, 0)}};
  CheckpointSource source(*checkpoint_);
  ThreadPool pool(1);
  int n_asked = 0;
  EXPECT_THAT(ScoreTask(task, *tokenizer_, source, {}, pool,
                        [&](double) {
                          return ++n_asked == 3 ? absl::CancelledError("stop") : absl::OkStatus();
                        }),
              HasCode(absl::StatusCode::kCancelled));
  EXPECT_EQ(n_asked, 3);
}

TEST_F(ScoreTaskTest, BosIsTheTokenizersRuleUnlessSkipped) {
  const Task task{
      .name = "t", .kind = TaskKind::kLastWord, .items = {Item("one two", {"three"}, 0)}};
  ASSERT_OK_AND_ASSIGN(const TaskScore with, Score(task));
  ASSERT_OK_AND_ASSIGN(const TaskScore without, Score(task, {.skip_bos = true}));
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, tokenizer_->Encode("one two", {}));
  const int n_bos = ids.front() == tokenizer_->bos();
  EXPECT_EQ(with.tokens - without.tokens, n_bos);
}

// -- Against transformers

struct GoldenTask {
  const char* name;
  const char* file;
};

class GoldenTaskTest : public ::testing::TestWithParam<GoldenTask> {};

TEST_P(GoldenTaskTest, EqualsTheIndependentImplementation) {
  WALSH_REQUIRE_DATA(model, "models/TinyStories-656K");
  WALSH_REQUIRE_DATA(packed, std::string("eval/") + GetParam().file);
  const testing::TempDir dir;
  std::string path = packed;
  if (packed.ends_with(".bz2")) {
    path = dir / "hellaswag.txt";
    const int code = std::system(absl::StrCat("bzip2 -dc '", packed, "' > '", path, "'").c_str());
    WALSH_SKIP_OR_FAIL(code != 0, "no bzip2 to unpack " << GetParam().file);
  }
  const auto golden = nlohmann::json::parse(
      testing::GoldenFile(absl::StrCat("evaluate/", GetParam().name, ".json")));
  ASSERT_OK_AND_ASSIGN(const Task all, ReadTask({.path = path}, 0));
  EXPECT_GT(all.items.size(), 1000u);
  Task task{.name = all.name, .kind = all.kind, .items = {}};
  for (const auto& expected : golden["items"]) {
    task.items.push_back(all.items[expected["index"].get<size_t>()]);
  }
  ASSERT_EQ(task.items.size(), 100u);

  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(model));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(checkpoint->tokenizer()));
  CheckpointSource source(*checkpoint);
  ThreadPool pool(2);
  ASSERT_OK_AND_ASSIGN(const TaskScore score,
                       ScoreTask(task, *tokenizer, source, {}, pool, Ignore));
  int64_t n_truncated = 0;
  for (size_t i = 0; i < 100; ++i) {
    const auto& expected = golden["items"][i];
    EXPECT_EQ(task.items[i].gold, expected["gold"].get<int64_t>());
    n_truncated += expected["is_truncated"].get<bool>();
    const auto lls = expected["log_likelihoods"].get<std::vector<double>>();
    ASSERT_EQ(score.likelihoods[i].size(), lls.size());
    for (size_t k = 0; k < lls.size(); ++k) {
      EXPECT_NEAR(score.likelihoods[i][k].log_likelihood, lls[k], 1e-4 + 1e-5 * std::abs(lls[k]))
          << "item " << expected["index"] << ", choice " << k;
    }
    EXPECT_EQ(score.likelihoods[i][0].is_greedy, expected["is_greedy"].get<bool>());
  }
  EXPECT_EQ(score.truncated_items, n_truncated);
  EXPECT_NEAR(score.accuracy.mean, golden["accuracy"].get<double>(), 1e-12);
  EXPECT_NEAR(score.accuracy.standard_error, golden["accuracy_stderr"].get<double>(), 1e-9);
  if (score.accuracy_norm.has_value()) {
    EXPECT_NEAR(score.accuracy_norm->mean, golden["accuracy_norm"].get<double>(), 1e-12);
    EXPECT_NEAR(score.accuracy_norm->standard_error, golden["accuracy_norm_stderr"].get<double>(),
                1e-9);
  }
  if (score.perplexity.has_value()) {
    const double expected = golden["perplexity"].get<double>();
    EXPECT_NEAR(score.perplexity->mean, expected, 1e-4 * expected);
    EXPECT_NEAR(score.perplexity->standard_error, golden["perplexity_stderr"].get<double>(),
                1e-4 * expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, GoldenTaskTest,
                         ::testing::Values(GoldenTask{"piqa", "piqa.jsonl"},
                                           GoldenTask{"arc_easy", "arc_easy.jsonl"},
                                           GoldenTask{"arc_challenge", "arc_challenge.jsonl"},
                                           GoldenTask{"hellaswag", "hellaswag_val_full.txt.bz2"},
                                           GoldenTask{"winogrande", "winogrande.jsonl"},
                                           GoldenTask{"lambada_openai", "lambada_openai.jsonl"}),
                         [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace walsh::evaluate
