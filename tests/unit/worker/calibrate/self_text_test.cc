#include "worker/calibrate/self_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/calibrate/byte_tokenizer.h"

namespace walsh::calibrate {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::ByteTokenizer;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

constexpr int32_t kEos = 7;

// A "model" whose next token depends on the last one and the position alone.
class FakeModel : public engine::LoadedModel {
 public:
  explicit FakeModel(bool has_bos, int32_t eos = -1) : tokenizer_(has_bos, eos) {
    config_.hidden = 8;
    config_.n_layers = 1;
    config_.n_heads = config_.n_kv_heads = 1;
    config_.head_dim = 8;
    config_.vocab = 300;
    config_.max_position = 64;
    config_.eos_tokens = {kEos};
  }
  const ModelConfig& config() const override { return config_; }
  const ArtifactInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  const ChatTemplate* chat_template() const override { return nullptr; }
  int64_t memory_bytes() const override { return 0; }
  int64_t packed_bytes_per_token() const override { return 0; }
  absl::Status Forward(const Batch& batch, const kernels::Stream&, ForwardScratch&,
                       Matrix& logits) const override {
    const auto n = static_cast<int64_t>(batch.sequences.size());
    largest_batch_ = std::max(largest_batch_, n);
    logits = Matrix(n, config_.vocab);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t v = 0; v < config_.vocab; ++v) logits(i, v) = -100;
      if (is_broken_) {
        logits(i, 0) = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      // Half the mass on EOS after position 20, the rest on two letters by one to three.
      const bool may_end = batch.positions[static_cast<size_t>(i)] > 20;
      logits(i, kEos) = may_end ? std::log(4.0f) : -100;
      logits(i, 'a') = 0;
      logits(i, 'b') = std::log(3.0f);
    }
    return absl::OkStatus();
  }

  ModelConfig config_;
  bool is_broken_ = false;
  mutable int64_t largest_batch_ = 0;

 private:
  ArtifactInfo info_;
  ByteTokenizer tokenizer_;
};

absl::StatusOr<std::vector<int32_t>> Generate(const FakeModel& model, int64_t n, uint64_t seed,
                                              int threads) {
  ThreadPool pool(threads);
  return GenerateText(model, n, seed, pool, [](int64_t) { return absl::OkStatus(); });
}

TEST(GenerateTextTest, DocumentsStartWithBosAndEndAtEosOrContext) {
  const FakeModel model(true);
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, Generate(model, 5000, 1, 2));
  ASSERT_EQ(ids.size(), 5000);
  EXPECT_EQ(ids[0], ByteTokenizer::kBos);
  // The last of the batch are cut where there is enough.
  const int64_t n_cut = SelfTextBatch(model.config_, 5000);
  const int64_t n_all = std::count(ids.begin(), ids.end(), ByteTokenizer::kBos);
  int64_t n_a = 0, n_b = 0, length = 0, n_documents = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const bool is_start = ids[i] == ByteTokenizer::kBos;
    if (i > 0 && n_documents <= n_all - n_cut) {
      // Nothing but a new document follows an end, and an end or the context precedes one.
      ASSERT_EQ(is_start, ids[i - 1] == kEos || length == 64) << i;
    }
    length = is_start ? 1 : length + 1;
    n_documents += is_start ? 1 : 0;
    n_a += ids[i] == 'a' ? 1 : 0;
    n_b += ids[i] == 'b' ? 1 : 0;
  }
  EXPECT_EQ(n_documents, n_all);
  EXPECT_GT(n_documents, 2 * n_cut);
  EXPECT_NEAR(static_cast<double>(n_b) / static_cast<double>(n_a), 3.0, 0.5);
}

TEST(GenerateTextTest, DependsOnTheSeedAndNotOnThreads) {
  const FakeModel model(true);
  ASSERT_OK_AND_ASSIGN(const auto one, Generate(model, 2000, 1, 1));
  ASSERT_OK_AND_ASSIGN(const auto three, Generate(model, 2000, 1, 3));
  ASSERT_OK_AND_ASSIGN(const auto other, Generate(model, 2000, 2, 1));
  EXPECT_EQ(one, three);
  EXPECT_NE(one, other);
}

// As in serving: some models name their end in the tokenizer's configuration only.
TEST(GenerateTextTest, TheTokenizersEosEndsADocumentToo) {
  FakeModel model(true, 'a');
  model.config_.eos_tokens.clear();
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, Generate(model, 3000, 1, 1));
  for (size_t i = 1; i < ids.size(); ++i) {
    ASSERT_TRUE(ids[i - 1] != 'a' || ids[i] == ByteTokenizer::kBos) << i;
  }
}

TEST(GenerateTextTest, BatchIsBoundedByTheCache) {
  FakeModel model(true);
  EXPECT_EQ(SelfTextBatch(model.config_, 64 * 5), 5);
  EXPECT_EQ(SelfTextBatch(model.config_, 1 << 20), 32);
  model.config_.n_layers = 80;
  model.config_.n_kv_heads = 64;
  model.config_.head_dim = 128;
  model.config_.max_position = 4096;
  EXPECT_EQ(SelfTextBatch(model.config_, 1 << 20), 1);
}

TEST(GenerateTextTest, RefusesWhatCannotWork) {
  FakeModel no_start(false);
  EXPECT_THAT(Generate(no_start, 100, 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("start token")));
  FakeModel broken(true);
  broken.is_broken_ = true;
  EXPECT_THAT(Generate(broken, 100, 1, 1), HasCode(absl::StatusCode::kDataLoss));
}

TEST(GenerateTextTest, StopsWhenTold) {
  const FakeModel model(true);
  ThreadPool pool(1);
  EXPECT_THAT(GenerateText(model, 10000, 1, pool,
                           [](int64_t n) {
                             return n > 500 ? absl::CancelledError("enough") : absl::OkStatus();
                           }),
              HasCode(absl::StatusCode::kCancelled));
}

}  // namespace
}  // namespace walsh::calibrate
