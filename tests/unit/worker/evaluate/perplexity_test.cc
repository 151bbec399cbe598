#include "worker/evaluate/perplexity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "common/status_macros.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/checkpoint.h"
#include "worker/kernels/kernels.h"

namespace walsh::evaluate {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;

class EvaluateWindowsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    checkpoint_ = Write("model", {.seed = 3, .n_layers = 3, .is_tied = true});
  }

  static calibrate::TokenWindows Windows(int64_t length, int64_t count) {
    calibrate::TokenWindows windows;
    windows.length = length;
    for (int64_t i = 0; i < length * count; ++i) {
      windows.ids.push_back(static_cast<int32_t>(i * i * 31 % 257));
    }
    return windows;
  }

  std::unique_ptr<Checkpoint> Write(const std::string& name,
                                    const testing::TinyModelOptions& options) {
    TinyModel(options).WriteHf(directory_ / name);
    auto checkpoint = Checkpoint::Open(directory_ / name);
    EXPECT_OK(checkpoint);
    return *std::move(checkpoint);
  }

  // Of each position of one window but the last, token by token through the whole model, in double.
  static std::vector<std::vector<double>> LogProbabilities(const Checkpoint& checkpoint,
                                                           const calibrate::TokenWindows& windows,
                                                           int64_t index) {
    const ModelConfig& config = checkpoint.config();
    const ForwardContext context = ForwardContext::Create(config, {kernels::Backend::kRef});
    CheckpointSource source(checkpoint);
    const Matrix embedding = source.Embedding().value();
    const int64_t n = windows.length, width = config.kv_width();
    Matrix hidden = Embed(config, embedding, windows.window(index));
    ForwardScratch scratch;
    for (int64_t l = 0; l < config.n_layers; ++l) {
      const DecoderLayer layer = source.Layer(l).value();
      Matrix keys(n, width), values(n, width);
      for (int64_t t = 0; t < n; ++t) {
        const int32_t position = static_cast<int32_t>(t);
        const SequenceSlice slice{0, 1, t, keys.data(), values.data()};
        EXPECT_OK(
            ForwardLayer(context, layer, {&position, 1}, {&slice, 1}, 1, hidden.row(t), scratch));
      }
    }
    const std::vector<float> norm = source.FinalNorm().value();
    std::vector<std::vector<double>> rows;
    for (int64_t t = 0; t + 1 < n; ++t) {
      double squares = 0;
      for (int64_t i = 0; i < config.hidden; ++i) squares += hidden(t, i) * hidden(t, i);
      const double factor =
          1 / std::sqrt(squares / static_cast<double>(config.hidden) + config.rms_norm_eps);
      std::vector<double> logits;
      double sum = 0;
      for (int64_t v = 0; v < config.vocab; ++v) {
        double logit = 0;
        for (int64_t i = 0; i < config.hidden; ++i) {
          logit += hidden(t, i) * factor * norm[static_cast<size_t>(i)] * embedding(v, i);
        }
        logits.push_back(logit);
        sum += std::exp(logit);
      }
      for (double& logit : logits) logit -= std::log(sum);
      rows.push_back(std::move(logits));
    }
    return rows;
  }

  // Mean over the predictions of the tokens from `first_scored` on.
  static double Loss(const std::vector<std::vector<double>>& log_probabilities,
                     const calibrate::TokenWindows& windows, int64_t index,
                     int64_t first_scored = 1) {
    double loss = 0;
    for (int64_t t = first_scored; t < windows.length; ++t) {
      const int32_t target = windows.window(index)[static_cast<size_t>(t)];
      loss -= log_probabilities[static_cast<size_t>(t - 1)][static_cast<size_t>(target)];
    }
    return loss / static_cast<double>(windows.length - first_scored);
  }
  double Loss(const calibrate::TokenWindows& windows, int64_t index) const {
    return Loss(LogProbabilities(*checkpoint_, windows, index), windows, index);
  }

  testing::TempDir directory_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

TEST_F(EvaluateWindowsTest, EqualsTokenByTokenEvaluationOfEachWindow) {
  const calibrate::TokenWindows windows = Windows(40, 5);
  CheckpointSource source(*checkpoint_);
  ThreadPool pool(2);
  double last = 0;
  ASSERT_OK_AND_ASSIGN(const WindowLosses losses,
                       EvaluateWindows(source, windows, pool, [&](double fraction) {
                         EXPECT_GE(fraction, last);
                         last = fraction;
                         return absl::OkStatus();
                       }));
  EXPECT_NEAR(last, 1.0, 1e-9);
  ASSERT_EQ(losses.losses.size(), 5);
  EXPECT_EQ(losses.n_tokens, 5 * 39);
  double mean = 0;
  for (int64_t i = 0; i < 5; ++i) {
    const double expected = Loss(windows, i);
    EXPECT_NEAR(losses.losses[static_cast<size_t>(i)], expected, 1e-4);
    mean += expected / 5;
  }
  EXPECT_NEAR(losses.Perplexity(), std::exp(mean), 1e-4 * std::exp(mean));
}

// Windows that fill several batches, the last one partly, with one and with three threads.
TEST_F(EvaluateWindowsTest, BatchesAndThreadsDoNotMatter) {
  const calibrate::TokenWindows windows = Windows(200, 23);
  ASSERT_GT(windows.count(), 2 * WindowsPerBatch(windows.length));
  CheckpointSource source(*checkpoint_);
  const auto ignore = [](double) { return absl::OkStatus(); };
  ThreadPool one(1), three(3);
  ASSERT_OK_AND_ASSIGN(const WindowLosses a, EvaluateWindows(source, windows, one, ignore));
  ASSERT_OK_AND_ASSIGN(const WindowLosses b, EvaluateWindows(source, windows, three, ignore));
  EXPECT_EQ(a.losses, b.losses);
  calibrate::TokenWindows last;
  last.length = 200;
  last.ids.assign(windows.window(22).begin(), windows.window(22).end());
  ASSERT_OK_AND_ASSIGN(const WindowLosses c, EvaluateWindows(source, last, one, ignore));
  EXPECT_NEAR(c.losses[0], a.losses[22], 1e-5);
}

TEST_F(EvaluateWindowsTest, StopsWhenTold) {
  CheckpointSource source(*checkpoint_);
  ThreadPool pool(1);
  EXPECT_THAT(EvaluateWindows(source, Windows(40, 2), pool,
                              [](double) { return absl::CancelledError("stop"); }),
              HasCode(absl::StatusCode::kCancelled));
}

TEST_F(EvaluateWindowsTest, NothingToEvaluate) {
  CheckpointSource source(*checkpoint_);
  ThreadPool pool(1);
  ASSERT_OK_AND_ASSIGN(const WindowLosses losses,
                       EvaluateWindows(source, calibrate::TokenWindows(), pool,
                                       [](double) { return absl::OkStatus(); }));
  EXPECT_EQ(losses.Perplexity(), 0);
}

// A source that overflows: its head is huge.
class OverflowingSource : public CheckpointSource {
 public:
  using CheckpointSource::CheckpointSource;
  absl::StatusOr<Matrix> Head() override {
    WALSH_ASSIGN_OR_RETURN(Matrix head, CheckpointSource::Head());
    for (float& v : head.span()) v *= 3e38f;
    return head;
  }
};

TEST_F(EvaluateWindowsTest, NonFiniteLossNamesTheWindow) {
  OverflowingSource source(*checkpoint_);
  ThreadPool pool(1);
  EXPECT_THAT(
      EvaluateWindows(source, Windows(40, 2), pool, [](double) { return absl::OkStatus(); }),
      StatusIs(absl::StatusCode::kDataLoss, HasSubstr("window 0")));
}

// Between any rows of logits, and the windows of a text's later block by their number in the text.
TEST_F(EvaluateWindowsTest, TheHeadStopsWithinAWindowAndNamesIt) {
  const calibrate::TokenWindows windows = Windows(3 * kLogitRows, 1);
  ThreadPool pool(2);
  CheckpointSource source(*checkpoint_);
  ASSERT_OK_AND_ASSIGN(FinalStates states, ForwardToHead(source, windows, pool,
                                                         [](double) { return absl::OkStatus(); }));
  int n_asked = 0;
  EXPECT_THAT(Losses(source.config(), states, windows, {}, pool,
                     [&](double) {
                       return ++n_asked == 2 ? absl::CancelledError("stop") : absl::OkStatus();
                     }),
              HasCode(absl::StatusCode::kCancelled));
  EXPECT_EQ(n_asked, 2);
  states.head(0, 0) = std::numeric_limits<float>::infinity();
  EXPECT_THAT(Losses(source.config(), states, windows, {.positions = {}, .first_window = 16}, pool,
                     [](double) { return absl::OkStatus(); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("window 16")));
}

class CompareTest : public EvaluateWindowsTest {
 protected:
  void SetUp() override {
    EvaluateWindowsTest::SetUp();
    other_ = Write("other", {.seed = 4, .n_layers = 2, .is_tied = true});
  }

  absl::StatusOr<Comparison> Run(const Checkpoint& reference, const Checkpoint& model,
                                 const calibrate::TokenWindows& windows,
                                 const ScoredFrom& scored_from, int n_threads) {
    ThreadPool pool(n_threads);
    const auto ignore = [](double) { return absl::OkStatus(); };
    CheckpointSource first(reference), second(model);
    WALSH_ASSIGN_OR_RETURN(const FinalStates before, ForwardToHead(first, windows, pool, ignore));
    WALSH_ASSIGN_OR_RETURN(const FinalStates after, ForwardToHead(second, windows, pool, ignore));
    return Compare(reference.config(), before, model.config(), after, windows, scored_from, pool,
                   ignore);
  }

  std::unique_ptr<Checkpoint> other_;
};

TEST_F(CompareTest, EqualsTokenByTokenComparison) {
  const calibrate::TokenWindows windows = Windows(40, 3);
  ASSERT_OK_AND_ASSIGN(const Comparison found, Run(*checkpoint_, *other_, windows, {}, 2));
  ASSERT_EQ(found.divergences.size(), 3);
  EXPECT_EQ(found.model.n_tokens, 3 * 39);
  double mean = 0;
  int64_t n_agreeing = 0;
  for (int64_t i = 0; i < 3; ++i) {
    const auto p = LogProbabilities(*checkpoint_, windows, i);
    const auto q = LogProbabilities(*other_, windows, i);
    double divergence = 0;
    for (size_t t = 0; t < p.size(); ++t) {
      for (size_t v = 0; v < p[t].size(); ++v) {
        divergence += std::exp(p[t][v]) * (p[t][v] - q[t][v]);
      }
      n_agreeing += std::max_element(p[t].begin(), p[t].end()) - p[t].begin() ==
                    std::max_element(q[t].begin(), q[t].end()) - q[t].begin();
    }
    divergence /= static_cast<double>(p.size());
    mean += divergence / 3;
    const auto w = static_cast<size_t>(i);
    EXPECT_NEAR(found.divergences[w], divergence, 1e-4 * divergence);
    EXPECT_NEAR(found.reference.losses[w], Loss(p, windows, i), 1e-4);
    EXPECT_NEAR(found.model.losses[w], Loss(q, windows, i), 1e-4);
  }
  EXPECT_GT(mean, 0.01);  // these models do differ
  EXPECT_NEAR(found.KlDivergence(), mean, 1e-4 * mean);
  EXPECT_EQ(found.n_agreeing, n_agreeing);
  EXPECT_DOUBLE_EQ(found.Top1Agreement(), static_cast<double>(n_agreeing) / (3 * 39));
}

TEST_F(CompareTest, AModelEqualsItself) {
  ASSERT_OK_AND_ASSIGN(const Comparison found,
                       Run(*checkpoint_, *checkpoint_, Windows(40, 3), {}, 2));
  EXPECT_EQ(found.KlDivergence(), 0);
  EXPECT_EQ(found.Top1Agreement(), 1);
  EXPECT_EQ(found.reference.losses, found.model.losses);
}

// The losses of both are those of evaluating each alone, to the bit, with any number of threads and
// windows longer than the rows of logits that are made at once.
TEST_F(CompareTest, ThreadsDoNotMatterNorDoesTheOtherModel) {
  const calibrate::TokenWindows windows = Windows(kLogitRows + 45, 3);
  ASSERT_OK_AND_ASSIGN(const Comparison one, Run(*checkpoint_, *other_, windows, {}, 1));
  ASSERT_OK_AND_ASSIGN(const Comparison three, Run(*checkpoint_, *other_, windows, {}, 3));
  EXPECT_EQ(one.divergences, three.divergences);
  EXPECT_EQ(one.model.losses, three.model.losses);
  ThreadPool pool(2);
  const auto ignore = [](double) { return absl::OkStatus(); };
  CheckpointSource first(*checkpoint_), second(*other_);
  ASSERT_OK_AND_ASSIGN(const WindowLosses before, EvaluateWindows(first, windows, pool, ignore));
  ASSERT_OK_AND_ASSIGN(const WindowLosses after, EvaluateWindows(second, windows, pool, ignore));
  EXPECT_EQ(one.reference.losses, before.losses);
  EXPECT_EQ(one.model.losses, after.losses);
}

// Overlapping windows: what the window before has predicted is not predicted again.
TEST_F(CompareTest, PredictsFromTheGivenPositionsOn) {
  const calibrate::TokenWindows windows = Windows(40, 2);
  const std::vector<int64_t> scored_from = {1, 30};
  ASSERT_OK_AND_ASSIGN(const Comparison found,
                       Run(*checkpoint_, *other_, windows, {.positions = scored_from}, 2));
  EXPECT_EQ(found.model.n_tokens, 39 + 10);
  EXPECT_NEAR(found.model.losses[1],
              Loss(LogProbabilities(*other_, windows, 1), windows, 1, /*first_scored=*/30), 1e-4);
}

TEST(WindowLossesTest, MeansAreOverTokens) {
  EXPECT_EQ(WindowLosses().Perplexity(), 0);
  EXPECT_EQ(WindowLosses().TokenMean({}), 0);
  WindowLosses losses{.losses = {1, 2}, .n_scored = {3, 1}, .n_tokens = 4};
  EXPECT_DOUBLE_EQ(losses.TokenMean(losses.losses), 1.25);
  EXPECT_DOUBLE_EQ(losses.Perplexity(), std::exp(1.25));
  losses.Append({.losses = {5}, .n_scored = {4}, .n_tokens = 4});
  EXPECT_DOUBLE_EQ(losses.TokenMean(losses.losses), 25.0 / 8);
  EXPECT_DOUBLE_EQ(losses.TokenMean(std::vector<double>{8, 0, 2}), 4);
}

TEST_F(CompareTest, RefusesAnotherVocabulary) {
  const auto larger = Write("larger", {.seed = 5, .vocab = 300, .is_tied = true});
  EXPECT_THAT(
      Run(*larger, *checkpoint_, Windows(40, 1), {}, 1),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a vocabulary of 300 tokens")));
}

}  // namespace
}  // namespace walsh::evaluate
