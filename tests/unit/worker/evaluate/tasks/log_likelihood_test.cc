#include "worker/evaluate/tasks/log_likelihood.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <memory>
#include <vector>

#include "common/status_macros.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/checkpoint.h"

namespace walsh::evaluate {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;

absl::Status Ignore(double) { return absl::OkStatus(); }

// Of this process since its start.
int64_t PeakMemoryKib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

class LogLikelihoodsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyModel({.seed = 3, .n_layers = 3}).WriteHf(directory_ / "model");
    auto checkpoint = Checkpoint::Open(directory_ / "model");
    ASSERT_OK(checkpoint);
    checkpoint_ = *std::move(checkpoint);
  }

  static std::vector<int32_t> Ids(int64_t n, int64_t seed) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n; ++i) {
      ids.push_back(static_cast<int32_t>((i * i * 31 + seed * 101 + i * seed) % 257));
    }
    return ids;
  }

  // `n` contexts of many lengths with one to four continuations.
  static std::vector<ContextTokens> Contexts(int64_t n) {
    std::vector<ContextTokens> contexts;
    for (int64_t i = 0; i < n; ++i) {
      ContextTokens tokens{.context = Ids(1 + i * 7 % 60, i), .continuations = {}};
      for (int64_t k = 0; k <= i % 4; ++k) {
        tokens.continuations.push_back(Ids(1 + (i + 3 * k) % 9, i + k + 50));
      }
      contexts.push_back(std::move(tokens));
    }
    return contexts;
  }

  absl::StatusOr<std::vector<std::vector<Likelihood>>> Run(
      const std::vector<ContextTokens>& contexts, int n_threads = 2) {
    CheckpointSource source(*checkpoint_);
    ThreadPool pool(n_threads);
    return LogLikelihoods(source, contexts, pool, Ignore);
  }

  // One whole sequence as a window, from which the losses of its last tokens are taken.
  double Alone(const std::vector<int32_t>& context, const std::vector<int32_t>& continuation) {
    CheckpointSource source(*checkpoint_);
    ThreadPool pool(1);
    calibrate::TokenWindows window;
    window.ids = context;
    window.ids.insert(window.ids.end(), continuation.begin(), continuation.end());
    window.length = static_cast<int64_t>(window.ids.size());
    const std::vector<int64_t> scored_from = {static_cast<int64_t>(context.size())};
    const FinalStates states = ForwardToHead(source, window, pool, Ignore).value();
    return -Losses(checkpoint_->config(), states, window, {.positions = scored_from}, pool, Ignore)
                .value()
                .losses[0] *
           static_cast<double>(continuation.size());
  }

  testing::TempDir directory_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

TEST_F(LogLikelihoodsTest, EqualWholeSequencesOneByOne) {
  const std::vector<ContextTokens> contexts = Contexts(90);  // several batches
  ASSERT_OK_AND_ASSIGN(const auto found, Run(contexts));
  ASSERT_EQ(found.size(), contexts.size());
  for (size_t i = 0; i < contexts.size(); ++i) {
    ASSERT_EQ(found[i].size(), contexts[i].continuations.size());
    for (size_t k = 0; k < found[i].size(); ++k) {
      EXPECT_NEAR(found[i][k].log_likelihood,
                  Alone(contexts[i].context, contexts[i].continuations[k]), 2e-4)
          << i << ", " << k;
    }
  }
}

// More keys and values than are held at once.
TEST_F(LogLikelihoodsTest, ManyContinuationsOfALongContext) {
  std::vector<ContextTokens> contexts = {{.context = Ids(3, 5), .continuations = {Ids(4, 1)}},
                                         {.context = Ids(240, 1), .continuations = {}},
                                         {.context = Ids(7, 2), .continuations = {Ids(5, 9)}}};
  for (int64_t k = 0; k < 100; ++k) contexts[1].continuations.push_back(Ids(1 + k % 9, k));
  ASSERT_OK_AND_ASSIGN(const auto found, Run(contexts));
  for (size_t i = 0; i < contexts.size(); ++i) {
    for (size_t k = 0; k < found[i].size(); ++k) {
      EXPECT_NEAR(found[i][k].log_likelihood,
                  Alone(contexts[i].context, contexts[i].continuations[k]), 2e-4)
          << i << ", " << k;
    }
  }
}

// Goal:   a context's keys and values are not held once for each of its continuations.
// Method: with 4,000 of them that were 2 GB.
TEST_F(LogLikelihoodsTest, MemoryDoesNotGrowWithTheContinuations) {
  TinyModel({.seed = 3, .n_layers = 1, .n_heads = 8, .n_kv_heads = 8, .head_dim = 32})
      .WriteHf(directory_ / "wide");
  ASSERT_OK_AND_ASSIGN(const auto wide, Checkpoint::Open(directory_ / "wide"));
  ContextTokens tokens{.context = Ids(250, 1), .continuations = {}};
  for (int64_t k = 0; k < 4000; ++k) tokens.continuations.push_back(Ids(2, k));
  CheckpointSource source(*wide);
  ThreadPool pool(2);
  const int64_t before = PeakMemoryKib();
  ASSERT_OK(LogLikelihoods(source, std::vector{tokens}, pool, Ignore));
  EXPECT_LT(PeakMemoryKib() - before, 256 << 10);
}

TEST_F(LogLikelihoodsTest, ThreadsAndNeighboursDoNotMatter) {
  const std::vector<ContextTokens> contexts = Contexts(700);  // more than a block
  int64_t n_tokens = 0;
  for (const ContextTokens& tokens : contexts) n_tokens += ForwardedTokens(tokens);
  ASSERT_GT(n_tokens, 16384);
  ASSERT_OK_AND_ASSIGN(const auto one, Run(contexts, 1));
  ASSERT_OK_AND_ASSIGN(const auto three, Run(contexts, 3));
  for (size_t i = 0; i < contexts.size(); ++i) {
    for (size_t k = 0; k < one[i].size(); ++k) {
      EXPECT_EQ(one[i][k].log_likelihood, three[i][k].log_likelihood);
      EXPECT_EQ(one[i][k].is_greedy, three[i][k].is_greedy);
    }
  }
  ASSERT_OK_AND_ASSIGN(const auto last, Run({contexts.back()}, 1));
  EXPECT_NEAR(last[0][0].log_likelihood, one.back()[0].log_likelihood, 1e-4);
}

// What greedy decoding gives after a context is greedy, and another continuation is not.
TEST_F(LogLikelihoodsTest, FindsTheLikeliest) {
  const std::vector<int32_t> context = Ids(20, 1);
  std::vector<int32_t> greedy;
  for (int step = 0; step < 3; ++step) {
    ContextTokens tokens{.context = context, .continuations = {}};
    for (int32_t id = 0; id < checkpoint_->config().vocab; ++id) {
      tokens.continuations.push_back(greedy);
      tokens.continuations.back().push_back(id);
    }
    ASSERT_OK_AND_ASSIGN(const auto found, Run({tokens}));
    int n_greedy = 0;
    double highest = -1e9;
    size_t best = 0;
    for (size_t id = 0; id < found[0].size(); ++id) {
      n_greedy += found[0][id].is_greedy;
      if (found[0][id].log_likelihood > highest) {
        highest = found[0][id].log_likelihood;
        best = id;
      }
    }
    EXPECT_EQ(n_greedy, 1);
    EXPECT_TRUE(found[0][best].is_greedy);
    greedy.push_back(static_cast<int32_t>(best));
  }
}

TEST_F(LogLikelihoodsTest, FillsTheModelsContextAndNoMore) {
  EXPECT_OK(Run({{.context = Ids(200, 1), .continuations = {Ids(57, 2)}}}));  // 256 are read
  EXPECT_THAT(Run({{.context = Ids(200, 1), .continuations = {Ids(58, 2)}}}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("have 258 tokens, the model takes 257")));
}

TEST_F(LogLikelihoodsTest, RefusesWhatCannotBeScored) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(Run({{.context = {}, .continuations = {{1}}}}), HasCode(invalid));
  EXPECT_THAT(Run({{.context = {1}, .continuations = {{}}}}), HasCode(invalid));
  EXPECT_THAT(Run({{.context = {1}, .continuations = {{320}}}}),
              StatusIs(invalid, HasSubstr("outside the model's vocabulary of 320")));
  EXPECT_THAT(Run({{.context = {-1}, .continuations = {{1}}}}), HasCode(invalid));
  ASSERT_OK_AND_ASSIGN(const auto nothing, Run({}));
  EXPECT_TRUE(nothing.empty());
}

TEST_F(LogLikelihoodsTest, TellsHowFarItIsAndStops) {
  CheckpointSource source(*checkpoint_);
  ThreadPool pool(1);
  double last = 0;
  ASSERT_OK(LogLikelihoods(source, Contexts(90), pool, [&](double fraction) {
    EXPECT_GE(fraction, last);
    last = fraction;
    return absl::OkStatus();
  }));
  EXPECT_NEAR(last, 1, 1e-12);
  EXPECT_THAT(LogLikelihoods(source, Contexts(2), pool,
                             [](double) { return absl::CancelledError("stop"); }),
              HasCode(absl::StatusCode::kCancelled));
}

}  // namespace
}  // namespace walsh::evaluate
