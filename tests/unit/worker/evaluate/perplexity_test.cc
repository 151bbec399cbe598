#include "worker/evaluate/perplexity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
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
    TinyModel({.seed = 3, .n_layers = 3, .is_tied = true}).WriteHf(directory_ / "model");
    auto checkpoint = Checkpoint::Open(directory_ / "model");
    ASSERT_OK(checkpoint);
    checkpoint_ = *std::move(checkpoint);
  }

  static calibrate::TokenWindows Windows(int64_t length, int64_t count) {
    calibrate::TokenWindows windows;
    windows.length = length;
    for (int64_t i = 0; i < length * count; ++i) {
      windows.ids.push_back(static_cast<int32_t>(i * i * 31 % 257));
    }
    return windows;
  }

  // One window at a time, token by token through the whole model, in double.
  double Loss(const calibrate::TokenWindows& windows, int64_t index) {
    const ModelConfig& config = checkpoint_->config();
    const ForwardContext context = ForwardContext::Create(config, {kernels::Backend::kRef});
    CheckpointSource source(*checkpoint_);
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
    double loss = 0;
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
      const int32_t target = windows.window(index)[static_cast<size_t>(t + 1)];
      loss += std::log(sum) - logits[static_cast<size_t>(target)];
    }
    return loss / static_cast<double>(n - 1);
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

}  // namespace
}  // namespace walsh::evaluate
