// The published Gemma-3-270m as GGUF (Q4_K_M), where WALSH_GEMMA3 names the file (label slow).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "tests/testing/hand_cache.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/engine/loaded_model.h"

namespace walsh::pipeline {
namespace {

class Gemma3Test : public testing::JobTest {
 protected:
  void SetUp() override {
    const char* path = std::getenv("WALSH_GEMMA3");
    if (path == nullptr) GTEST_SKIP() << "WALSH_GEMMA3 does not name a file";
    path_ = path;
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(path_));
  }

  struct Continuation {
    std::vector<float> first_logits;  // of the token behind the prompt
    std::string text;                 // by greedy decoding
  };
  static Continuation Continue(const engine::LoadedModel& model, const std::string& prompt,
                               int n_new) {
    const ModelConfig& config = model.config();
    std::vector<int32_t> input = model.tokenizer().Encode(prompt, {}).value();
    const auto n_tokens_max = static_cast<int64_t>(input.size()) + n_new;
    testing::HandCache cache(config, n_tokens_max);
    const std::vector<engine::BlockId> blocks = cache.Take(n_tokens_max);
    ThreadPool pool(ThreadPool::HardwareThreads());
    ForwardScratch scratch;
    Matrix logits;
    Continuation continuation;
    std::vector<int32_t> added;
    for (int64_t n_past = 0; static_cast<int>(added.size()) < n_new;) {
      engine::LoadedModel::Batch batch;
      batch.kv = cache.pool();
      const auto n = static_cast<int64_t>(input.size());
      batch.tokens = input;
      for (int64_t i = 0; i < n; ++i) batch.positions.push_back(static_cast<int32_t>(n_past + i));
      batch.sequences.push_back({0, n, n_past, blocks, true});
      EXPECT_OK(model.Forward(batch, {.pool = &pool}, scratch, logits));
      n_past += n;
      const float* last = logits.row(0);
      if (added.empty()) continuation.first_logits.assign(last, last + config.vocab);
      input = {static_cast<int32_t>(std::max_element(last, last + config.vocab) - last)};
      added.push_back(input.front());
    }
    continuation.text = model.tokenizer().Decode(added, /*skip_special=*/true);
    return continuation;
  }

  std::string path_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

// Figures of transformers 5.24.0 in float32, with the file's weights dequantized by the Python
// package gguf 0.19.0 and 1 taken from its norms.
TEST_F(Gemma3Test, AgreesWithTransformers) {
  EXPECT_EQ(checkpoint_->config().sliding_window, 512);
  EXPECT_EQ(checkpoint_->config().window(4), 512);
  EXPECT_EQ(checkpoint_->config().window(5), 0);
  ASSERT_OK_AND_ASSIGN(const auto model, engine::LoadedModel::LoadDense(*checkpoint_));
  const Continuation continuation = Continue(*model, "The capital of France is", 7);
  const std::pair<const char*, float> expected[] = {{"▁the", 19.091f},
                                                    {"▁a", 18.548f},
                                                    {"▁Paris", 18.269f},
                                                    {"▁one", 18.113f},
                                                    {"▁known", 17.784f}};
  for (const auto& [token, logit] : expected) {
    const int32_t id = model->tokenizer().TokenId(token);
    ASSERT_GE(id, 0) << token;
    EXPECT_NEAR(continuation.first_logits[static_cast<size_t>(id)], logit, 2e-3) << token;
  }
  EXPECT_EQ(continuation.text, " the capital of the country of France");
}

TEST_F(Gemma3Test, FourBitsKeepIt) {
  WALSH_REQUIRE_DATA(corpus, "corpora/wikitext-train-1000.json");
  JobSpec spec = TinyJob();
  spec.source_path = path_;
  spec.rotation = rotate::Kind::kNone;
  spec.calibration_path = corpus;
  spec.n_calibration_windows = 8;
  spec.sequence_length = 256;
  spec.n_evaluation_windows = 2;
  // Longer than the sliding window.
  spec.evaluation_length = 1024;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec, ThreadPool::HardwareThreads()));
  // High for this model: windows start in the midst of a text, without its BOS.
  EXPECT_GT(report.perplexity_before, 20);
  EXPECT_LT(report.perplexity_before, 60);
  EXPECT_LT(report.perplexity_after, 1.2 * report.perplexity_before);
  RecordProperty("perplexity_before", std::to_string(report.perplexity_before));
  RecordProperty("perplexity_after", std::to_string(report.perplexity_after));
  ASSERT_OK_AND_ASSIGN(const auto model,
                       engine::LoadedModel::LoadArtifact(spec.output_directory, {}));
  EXPECT_FALSE(Continue(*model, "The capital of France is", 4).text.empty());
}

}  // namespace
}  // namespace walsh::pipeline
