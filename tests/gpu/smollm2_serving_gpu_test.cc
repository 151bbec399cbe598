// Goal:   a real model is served on the device as on the CPU.
// Method: SmolLM2-135M at 4 bits, quantized on the device; WikiText-2 through its runner, the CPU's
//         and the CPU's of the same weights in floats, logits of every position; then greedy texts
//         by several ways of running them. Model and texts come from outside (WALSH_SMOLLM2,
//         WALSH_TEST_DATA).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "tests/testing/recording_sink.h"
#include "tests/unit/worker/pipeline/smollm2_fixture.h"
#include "worker/engine/cuda/cuda_model.h"
#include "worker/engine/engine.h"
#include "worker/engine/loaded_model.h"
#include "worker/interop/export.h"
#include "worker/io/file_checkpoint.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/cuda_backend.h"

namespace walsh::pipeline {
namespace {

using engine::ModelRunner;
using engine::ServedModel;

constexpr int64_t kTexts = 8;
constexpr int64_t kLength = 256;

// ‖a − b‖ / ‖b‖ of all pairs of vectors that are added.
class Distance {
 public:
  void Add(std::span<const float> a, std::span<const float> b) {
    for (size_t i = 0; i < b.size(); ++i) {
      const double d = static_cast<double>(a[i]) - b[i];
      difference_ += d * d;
      norm_ += static_cast<double>(b[i]) * b[i];
    }
  }
  double value() const { return std::sqrt(difference_ / norm_); }

 private:
  double difference_ = 0;
  double norm_ = 0;
};

class SmolLm2ServingTest : public SmolLm2Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCudaBackend(0);
    if (!backend.ok()) GTEST_SKIP() << "no GPU: " << backend.status().message();
    SmolLm2Test::SetUp();
    if (IsSkipped()) return;
    spec_.quantizer.bits = 4;
    spec_.quantizer.group_size = 64;
    ThreadPool pool(ThreadPool::HardwareThreads());
    ASSERT_OK(RunJob(spec_, **backend, pool, testing::IgnoreProgress));
    ASSERT_OK_AND_ASSIGN(device_, engine::LoadCudaModel(spec_.output_directory, {}));
    ASSERT_OK_AND_ASSIGN(host_, engine::LoadedModel::LoadArtifact(spec_.output_directory, {}));
    // The same weights in floats.
    const std::filesystem::path dense = directory_ / "dense";
    std::filesystem::create_directory(dense);
    ASSERT_OK_AND_ASSIGN(
        const auto artifact,
        ArtifactReader::Open(spec_.output_directory, /*verify=*/false, /*n_threads=*/1));
    ASSERT_OK(interop::ExportArtifact(*artifact, {.dtype = StorageType::kF32}, dense,
                                      [](int64_t, int64_t) { return absl::OkStatus(); }));
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, OpenHfCheckpoint(dense));
    ASSERT_OK_AND_ASSIGN(exact_, engine::LoadedModel::LoadDense(*checkpoint));
    WALSH_REQUIRE_DATA(raw, "corpora/wiki.test.raw");
    std::stringstream text;
    text << std::ifstream(raw, std::ios::binary).rdbuf();
    ASSERT_OK_AND_ASSIGN(ids_, host_->tokenizer().Encode(text.str().substr(0, 100'000), {}));
    ASSERT_GE(static_cast<int64_t>(ids_.size()), kTexts * (kLength + 1));
  }

  std::unique_ptr<ModelRunner> MakeRunner(const ServedModel& model) {
    auto runner = model.MakeRunner({.n_blocks = kTexts * engine::KvBlocks(kLength),
                                    .n_rows = kTexts * kLength,
                                    .n_sequences = kTexts,
                                    .n_context = kLength,
                                    .pool = &pool_});
    EXPECT_OK(runner);
    return runner.ok() ? *std::move(runner) : nullptr;
  }

  // Rows [first, first + n) of every text; logits of the last.
  void Step(ModelRunner& runner, int64_t first, int64_t n) {
    engine::StepBatch batch;
    std::vector<std::vector<engine::BlockId>> tables(kTexts);
    for (int64_t t = 0; t < kTexts; ++t) {
      std::vector<engine::BlockId>& table = tables[static_cast<size_t>(t)];
      for (int64_t i = 0; i < engine::KvBlocks(kLength); ++i) {
        table.push_back(static_cast<engine::BlockId>(t * engine::KvBlocks(kLength) + i));
      }
      batch.sequences.push_back({.first_row = static_cast<int64_t>(batch.tokens.size()),
                                 .n_rows = n,
                                 .n_past = first,
                                 .blocks = table,
                                 .wanted = engine::Wanted::kLogits});
      const auto begin = ids_.begin() + t * (kLength + 1) + first;
      batch.tokens.insert(batch.tokens.end(), begin, begin + n);
    }
    ASSERT_OK(runner.Run(batch));
  }

  static double NextTokenLoss(std::span<const float> logits, int32_t next) {
    const float largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
    return largest + std::log(sum) - logits[static_cast<size_t>(next)];
  }

  std::vector<std::vector<int32_t>> Generate(int max_sequences, bool use_graphs, bool at_once) {
    auto model = engine::LoadCudaModel(spec_.output_directory,
                                       {.batch_invariant = true, .use_graphs = use_graphs});
    EXPECT_OK(model);
    auto engine = engine::Engine::Create(
        *model, {.max_sequences = max_sequences, .max_waiting = 64, .prefix_cache = !at_once},
        Clock::Real());
    EXPECT_OK(engine);
    std::vector<std::shared_ptr<testing::RecordingSink>> sinks;
    for (int i = 0; i < 32; ++i) {
      sinks.push_back(std::make_shared<testing::RecordingSink>());
      EXPECT_OK(
          (*engine)->Submit({.id = std::to_string(i),
                             .prompt = {ids_.begin() + i * 50, ids_.begin() + i * 50 + 40},
                             .sampling = {.max_tokens = 48, .temperature = 0, .ignore_eos = true}},
                            sinks.back()));
      if (!at_once) sinks.back()->WaitForEnd();
    }
    std::vector<std::vector<int32_t>> tokens;
    for (const auto& sink : sinks) {
      sink->WaitForEnd();
      EXPECT_OK(sink->status());
      tokens.push_back(sink->tokens());
    }
    return tokens;
  }

  ThreadPool pool_{ThreadPool::HardwareThreads()};
  std::shared_ptr<ServedModel> device_;
  std::shared_ptr<engine::LoadedModel> host_, exact_;
  std::vector<int32_t> ids_;
};

TEST_F(SmolLm2ServingTest, LogitsAndPerplexityAreThoseOfTheCpu) {
  const auto device = MakeRunner(*device_);
  const auto host = MakeRunner(*host_);
  const auto exact = MakeRunner(*exact_);
  const auto prompts = MakeRunner(*device_);
  Distance to_exact, to_host, of_prompts;
  double device_loss = 0, host_loss = 0;
  for (int64_t position = 0; position < kLength; ++position) {
    ASSERT_NO_FATAL_FAILURE(Step(*device, position, 1));
    ASSERT_NO_FATAL_FAILURE(Step(*host, position, 1));
    ASSERT_NO_FATAL_FAILURE(Step(*exact, position, 1));
    for (int64_t t = 0; t < kTexts; ++t) {
      const auto i = static_cast<size_t>(t);
      to_exact.Add(device->logits(i), exact->logits(i));
      to_host.Add(device->logits(i), host->logits(i));
      const int32_t next = ids_[static_cast<size_t>(t * (kLength + 1) + position + 1)];
      device_loss += NextTokenLoss(device->logits(i), next) / (kTexts * kLength);
      host_loss += NextTokenLoss(host->logits(i), next) / (kTexts * kLength);
    }
  }
  std::printf(
      "logits differ by %.5f of their norm from the CPU's in floats, by %.5f from its engine's; "
      "perplexity %.4f on the device, %.4f on the CPU\n",
      to_exact.value(), to_host.value(), std::exp(device_loss), std::exp(host_loss));
  EXPECT_LT(to_exact.value(), 0.02);
  // Most of it is the CPU's engine's, which rounds activations to 8 bits.
  EXPECT_LT(to_host.value(), 0.03);
  EXPECT_NEAR(std::exp(device_loss - host_loss), 1.0, 0.005);

  // The same texts as prompts: all rows in one pass.
  ASSERT_NO_FATAL_FAILURE(Step(*prompts, 0, kLength));
  for (size_t t = 0; t < kTexts; ++t) of_prompts.Add(prompts->logits(t), device->logits(t));
  EXPECT_LT(of_prompts.value(), 0.02);
}

TEST_F(SmolLm2ServingTest, GreedyTextsDoNotDependOnHowTheyAreRun) {
  const auto expected = Generate(1, /*use_graphs=*/false, /*at_once=*/false);
  EXPECT_EQ(Generate(1, /*use_graphs=*/true, /*at_once=*/false), expected);
  EXPECT_EQ(Generate(32, /*use_graphs=*/true, /*at_once=*/true), expected);
  EXPECT_EQ(Generate(32, /*use_graphs=*/false, /*at_once=*/true), expected);
}

}  // namespace
}  // namespace walsh::pipeline
