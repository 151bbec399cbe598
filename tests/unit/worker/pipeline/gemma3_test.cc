// The published Gemma-3-270m as GGUF (Q4_K_M), where WALSH_GEMMA3 names the file (label slow).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

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

  // What greedy decoding adds to a prompt.
  static std::string Continue(const engine::LoadedModel& model, const std::string& prompt,
                              int n_new) {
    const ModelConfig& config = model.config();
    std::vector<int32_t> input = model.tokenizer().Encode(prompt, {}).value();
    const auto capacity = static_cast<int64_t>(input.size()) + n_new;
    std::vector<float> keys(static_cast<size_t>(config.n_layers * capacity * config.kv_width()));
    std::vector<float> values(keys.size());
    ThreadPool pool(ThreadPool::HardwareThreads());
    ForwardScratch scratch;
    Matrix logits;
    std::vector<int32_t> added;
    for (int64_t n_past = 0; n_past < capacity;) {
      engine::LoadedModel::Batch batch;
      const auto n = static_cast<int64_t>(input.size());
      batch.tokens = input;
      for (int64_t i = 0; i < n; ++i) batch.positions.push_back(static_cast<int32_t>(n_past + i));
      batch.sequences.push_back({0, n, n_past, keys.data(), values.data(), capacity, true});
      EXPECT_OK(model.Forward(batch, {.pool = &pool}, scratch, logits));
      n_past += n;
      const float* last = logits.row(0);
      input = {static_cast<int32_t>(std::max_element(last, last + config.vocab) - last)};
      added.push_back(input.front());
    }
    return model.tokenizer().Decode(added, /*skip_special=*/true);
  }

  std::string path_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

TEST_F(Gemma3Test, KnowsTheCapitalOfFrance) {
  EXPECT_EQ(checkpoint_->config().architecture, "Gemma3ForCausalLM");
  EXPECT_EQ(checkpoint_->config().sliding_window, 512);
  EXPECT_EQ(checkpoint_->config().window(5), 0);
  ASSERT_OK_AND_ASSIGN(const auto model, engine::LoadedModel::Load8Bit(*checkpoint_));
  const std::string text = Continue(*model, "The capital of France is", 6);
  EXPECT_NE(text.find("Paris"), std::string::npos) << text;
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
  EXPECT_GT(report.perplexity_before, 5);
  EXPECT_LT(report.perplexity_before, 60);
  EXPECT_LT(report.perplexity_after, 1.4 * report.perplexity_before);
  RecordProperty("perplexity_before", std::to_string(report.perplexity_before));
  RecordProperty("perplexity_after", std::to_string(report.perplexity_after));
  ASSERT_OK_AND_ASSIGN(const auto model,
                       engine::LoadedModel::LoadArtifact(spec.output_directory, {}));
  const std::string text = Continue(*model, "The capital of France is", 6);
  EXPECT_NE(text.find("Paris"), std::string::npos) << text;
}

}  // namespace
}  // namespace walsh::pipeline
