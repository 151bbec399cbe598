// Forward passes of two small published models against reference.json, which was computed in
// float64 by an independent program.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/model/dense_model.h"
#include "tests/unit/worker/model/llama2c.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh {
namespace {

using testing::DenseModel;
using testing::Sequence;

constexpr int kNewTokens = 64;

nlohmann::json ReadJson(const std::string& path) {
  std::ifstream in(path);
  return nlohmann::json::parse(in);
}

// Stories as reference.json took them: stripped, blank lines collapsed.
std::vector<std::string> Stories(const std::string& path, size_t n) {
  std::vector<std::string> stories;
  for (std::string story : ReadJson(path)) {
    if (stories.size() == n) break;
    story.erase(0, story.find_first_not_of(" \n\r\t"));
    story.erase(story.find_last_not_of(" \n\r\t") + 1);
    for (size_t at; (at = story.find("\n\n")) != std::string::npos;) story.erase(at, 1);
    stories.push_back(std::move(story));
  }
  return stories;
}

std::vector<kernels::Stream> Streams(ThreadPool* pool) {
  return {{.backend = kernels::Backend::kRef}, {}, {.pool = pool}};
}

void ExpectTopLogits(const DenseModel& model, const nlohmann::json& reference,
                     const kernels::Stream& stream) {
  const std::vector<int32_t> prompt = reference["prompt_ids"];
  Sequence sequence(model, stream, static_cast<int64_t>(prompt.size()));
  ASSERT_OK_AND_ASSIGN(const Matrix logits, sequence.Append(prompt));
  const float* last = logits.row(logits.rows() - 1);
  for (const auto& entry : reference["last_logits_top10"]) {
    EXPECT_NEAR(last[entry[0].get<int64_t>()], entry[1].get<double>(), 1e-4) << entry[0];
  }
  const auto highest = reference["last_logits_top10"][9][1].get<float>();
  EXPECT_EQ(std::count_if(last, last + model.config.vocab,
                          [&](float logit) { return logit >= highest - 1e-4f; }),
            10);
}

void ExpectGreedyIds(const DenseModel& model, const nlohmann::json& reference,
                     const kernels::Stream& stream) {
  const std::vector<int32_t> prompt = reference["prompt_ids"];
  const std::vector<int32_t> expected = reference["greedy_ids"];
  ASSERT_EQ(expected.size(), prompt.size() + kNewTokens);
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids,
                       testing::GreedyIds(model, stream, prompt, kNewTokens));
  EXPECT_EQ(ids, expected);
}

class Stories260KTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_DATA(dir, "models/stories260K");
    ASSERT_OK_AND_ASSIGN(model_, testing::ReadLlama2cModel(dir + "/stories260K.bin"));
    reference_ = ReadJson(dir + "/reference.json");
    dir_ = dir;
  }
  std::string dir_;
  DenseModel model_;
  nlohmann::json reference_;
  ThreadPool pool_{2};
};

TEST_F(Stories260KTest, TopLogits) {
  for (const kernels::Stream& stream : Streams(&pool_)) ExpectTopLogits(model_, reference_, stream);
}

TEST_F(Stories260KTest, GreedyIds) {
  for (const kernels::Stream& stream : Streams(&pool_)) ExpectGreedyIds(model_, reference_, stream);
}

TEST_F(Stories260KTest, LossOfEachStory) {
  WALSH_REQUIRE_DATA(corpus, "corpora/tinystories-train-1000.json");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer,
                       testing::Llama2cTokenizer::Read(dir_ + "/tok512.bin", model_.config.vocab));
  const nlohmann::json& expected = reference_["per_doc_nll_sum_and_tokens"];
  const std::vector<std::string> stories = Stories(corpus, expected.size());
  EXPECT_EQ(tokenizer.Encode(stories[0]), reference_["first_doc_ids"].get<std::vector<int32_t>>());
  double sum = 0;
  double n_tokens = 0;
  for (size_t i = 0; i < stories.size(); ++i) {
    const std::vector<int32_t> ids = tokenizer.Encode(stories[i]);
    ASSERT_EQ(ids.size() - 1, expected[i][1].get<size_t>()) << "story " << i;
    ASSERT_OK_AND_ASSIGN(const double loss,
                         testing::NegativeLogLikelihood(model_, {.pool = &pool_}, ids));
    // The sum in nats over hundreds of tokens: a stricter limit than on their mean.
    EXPECT_NEAR(loss, expected[i][0].get<double>(), 1e-3) << "story " << i;
    sum += loss;
    n_tokens += static_cast<double>(ids.size() - 1);
  }
  EXPECT_NEAR(sum / n_tokens, reference_["mean_nll"].get<double>(), 1e-6);
}

class TinyStories656KTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_DATA(dir, "models/TinyStories-656K");
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(dir));
    ASSERT_OK_AND_ASSIGN(model_, DenseModel::Load(*checkpoint_));
    reference_ = ReadJson(dir + "/reference.json");
  }
  std::unique_ptr<Checkpoint> checkpoint_;
  DenseModel model_;
  nlohmann::json reference_;
  ThreadPool pool_{2};
};

TEST_F(TinyStories656KTest, TopLogits) {
  for (const kernels::Stream& stream : Streams(&pool_)) ExpectTopLogits(model_, reference_, stream);
}

TEST_F(TinyStories656KTest, GreedyIds) {
  for (const kernels::Stream& stream : Streams(&pool_)) ExpectGreedyIds(model_, reference_, stream);
}

// Stories with characters outside the vocabulary were encoded otherwise by the reference.
TEST_F(TinyStories656KTest, LossOfEachStory) {
  WALSH_REQUIRE_DATA(corpus, "corpora/tinystories-train-1000.json");
  constexpr int32_t kUnknown = 0;
  constexpr int32_t kEos = 2;
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(checkpoint_->tokenizer()));
  const nlohmann::json& expected = reference_["per_doc_nll_sum_and_tokens"];
  const std::vector<std::string> stories = Stories(corpus, expected.size());
  int n_compared = 0;
  for (size_t i = 0; i < stories.size(); ++i) {
    ASSERT_OK_AND_ASSIGN(std::vector<int32_t> ids, tokenizer->Encode(stories[i], {}));
    if (std::find(ids.begin(), ids.end(), kUnknown) != ids.end()) continue;
    ids.push_back(kEos);
    if (i == 0) {
      EXPECT_EQ(ids, reference_["first_doc_ids"].get<std::vector<int32_t>>());
    }
    ASSERT_EQ(ids.size() - 1, expected[i][1].get<size_t>()) << "story " << i;
    ASSERT_OK_AND_ASSIGN(const double loss,
                         testing::NegativeLogLikelihood(model_, {.pool = &pool_}, ids));
    EXPECT_NEAR(loss, expected[i][0].get<double>(), 1e-3) << "story " << i;
    ++n_compared;
  }
  EXPECT_GE(n_compared, 88);
}

}  // namespace
}  // namespace walsh
