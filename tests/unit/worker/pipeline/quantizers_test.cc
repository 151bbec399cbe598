// Each way to quantize, from a job to the engine that serves what it stored.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "tests/testing/hand_cache.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/calibrate/token_windows.h"
#include "worker/engine/loaded_model.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/perplexity.h"
#include "worker/io/artifact.h"

namespace walsh::pipeline {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

// −log p(next) of a row of logits.
double Loss(const float* logits, int64_t vocab, int32_t next) {
  double highest = logits[0], sum = 0;
  for (int64_t i = 1; i < vocab; ++i) highest = std::max<double>(highest, logits[i]);
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - highest);
  return std::log(sum) + highest - logits[next];
}

// Mean loss of each window, a token at a time, as the engine decodes.
std::vector<double> ServedLosses(const engine::LoadedModel& model,
                                 const calibrate::TokenWindows& windows) {
  const ModelConfig& config = model.config();
  std::vector<double> losses;
  for (int64_t w = 0; w < windows.count(); ++w) {
    const auto ids = windows.window(w);
    testing::HandCache cache(config, windows.length);
    const std::vector<engine::BlockId> blocks = cache.Take(windows.length);
    ForwardScratch scratch;
    Matrix logits;
    double sum = 0;
    for (int64_t t = 0; t + 1 < windows.length; ++t) {
      engine::LoadedModel::Batch batch;
      batch.kv = cache.pool();
      batch.tokens = {ids[static_cast<size_t>(t)]};
      batch.positions = {static_cast<int32_t>(t)};
      batch.sequences.push_back(
          {.first_row = 0, .n_rows = 1, .n_past = t, .blocks = blocks, .needs_logits = true});
      EXPECT_OK(model.Forward(batch, {}, scratch, logits));
      sum += Loss(logits.row(0), config.vocab, ids[static_cast<size_t>(t + 1)]);
    }
    losses.push_back(sum / static_cast<double>(windows.length - 1));
  }
  return losses;
}

struct Variant {
  const char* name;
  std::function<void(JobSpec&)> change;
  double bits_per_weight;  // of groups of 32
};

class QuantizersTest : public testing::JobTest, public ::testing::WithParamInterface<Variant> {};

// What was stored is what is served, up to the engine's rounding of activations.
TEST_P(QuantizersTest, ServesWhatItStored) {
  JobSpec spec = TinyJob({.has_attention_bias = true});
  spec.quantizer.bits = 2;
  spec.quantizer.group_size = 32;
  GetParam().change(spec);
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_NEAR(report.bits_per_weight, GetParam().bits_per_weight, 1e-9);
  EXPECT_GT(report.perplexity_after, 0);

  ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(spec.output_directory, true, 1));
  std::vector<int32_t> ids;
  for (int i = 0; i < 3 * 48; ++i) ids.push_back(i * i * 7 % 251 + 3);
  const calibrate::TokenWindows windows = calibrate::CutWindows(ids, 48, 3);
  ThreadPool pool(2);
  evaluate::ArtifactSource source(*artifact);
  ASSERT_OK_AND_ASSIGN(
      const evaluate::WindowLosses stored,
      evaluate::EvaluateWindows(source, windows, pool, [](double) { return absl::OkStatus(); }));
  ASSERT_OK_AND_ASSIGN(const auto model, engine::LoadedModel::LoadArtifact(spec.output_directory,
                                                                           {.head_8bit = false}));
  const std::vector<double> served = ServedLosses(*model, windows);
  ASSERT_EQ(served.size(), stored.losses.size());
  for (size_t i = 0; i < served.size(); ++i) EXPECT_NEAR(served[i], stored.losses[i], 0.02);
}

// The tiny model has 2 layers of 64 · (64 + 32 + 32 + 64) + 3 · 64 · 128 weights.
double MixedBits() {
  const double down = 64 * 128, layer = 64 * (64 + 32 + 32 + 64) + 3 * down, q = 64 * 64;
  return ((2 * layer - down - q) * (2 + 18 / 32.0) + down * (4 + 20 / 32.0) + q * (8 + 24 / 32.0)) /
         (2 * layer);
}

double PerChannelCodebookBits() {
  const double outputs = 64 + 32 + 32 + 64 + 128 + 128 + 64;
  return 2 + 64 * outputs / (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128);
}

// Linears of other bits have uniform grids.
double MixedCodebookBits() {
  const double layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128, other = 64 * 32 + 64 * 128;
  return ((layer - other) * (2 + 64 / 32.0) + other * (3 + 19 / 32.0)) / layer;
}

INSTANTIATE_TEST_SUITE_P(
    Options, QuantizersTest,
    ::testing::Values(
        Variant{"Gptaq", [](JobSpec& s) { s.quantizer.method = gptq::Method::kGptaq; },
                2 + 18 / 32.0},
        Variant{"ActOrder",
                [](JobSpec& s) { s.quantizer.column_order = gptq::ColumnOrder::kActOrder; },
                2 + 18 / 32.0},
        Variant{"GptaqActOrder",
                [](JobSpec& s) {
                  s.quantizer.method = gptq::Method::kGptaq;
                  s.quantizer.column_order = gptq::ColumnOrder::kActOrder;
                },
                2 + 18 / 32.0},
        Variant{"Codebook", [](JobSpec& s) { s.quantizer.grid = gptq::Grid::kCodebook; },
                2 + 64 / 32.0},
        Variant{"CodebookPerChannel",
                [](JobSpec& s) {
                  s.quantizer.grid = gptq::Grid::kCodebook;
                  s.quantizer.group_size = -1;
                  s.quantizer.column_order = gptq::ColumnOrder::kActOrder;
                },
                PerChannelCodebookBits()},
        Variant{"FloatZero", [](JobSpec& s) { s.quantizer.zero_point = gptq::ZeroPoint::kFloat; },
                2 + 32 / 32.0},
        Variant{"FloatZeroThreeBits",
                [](JobSpec& s) {
                  s.quantizer.zero_point = gptq::ZeroPoint::kFloat;
                  s.quantizer.bits = 3;
                  s.quantizer.method = gptq::Method::kGptaq;
                },
                3 + 32 / 32.0},
        Variant{"CodebookWithOverrides",
                [](JobSpec& s) {
                  s.quantizer.grid = gptq::Grid::kCodebook;
                  s.overrides = {{"*.{k,gate}_proj", 3}};
                },
                MixedCodebookBits()},
        Variant{"Overrides",
                [](JobSpec& s) {
                  s.overrides = {{"layers.0.mlp.down_proj", 4}, {"*.{1-9}.*.q_proj", 8}};
                },
                MixedBits()}),
    [](const auto& variant) { return std::string(variant.param.name); });

class OverridesTest : public testing::JobTest {};

// q, k and v are multiplied together, and so are gate and up.
TEST_F(OverridesTest, EachLinearHasItsOwnBits) {
  JobSpec spec = TinyJob();
  spec.quantizer.bits = 2;
  spec.quantizer.group_size = 32;
  spec.overrides = {{"*", 3}, {"layers.1.*", 2}, {"*.{q,up}_proj", 8}, {"layers.1.*.up_proj", 4}};
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  const std::vector<int> expected = {8, 3, 3, 3, 3, 8, 3, 8, 2, 2, 2, 2, 4, 2};
  ASSERT_EQ(report.linears.size(), expected.size());
  ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(spec.output_directory, true, 1));
  for (size_t i = 0; i < expected.size(); ++i) {
    const LinearReport& linear = report.linears[i];
    EXPECT_EQ(linear.bits, expected[i]) << linear.name;
    ASSERT_OK_AND_ASSIGN(const GptqShape shape, artifact->ShapeOf("model." + linear.name));
    EXPECT_EQ(shape.bits, expected[i]) << linear.name;
  }
}

TEST_F(OverridesTest, TakeTheDiskThatTheyNeed) {
  JobSpec spec = TinyJob();
  spec.quantizer.bits = 2;
  spec.quantizer.group_size = 32;
  ASSERT_OK_AND_ASSIGN(const JobPlan two, PlanJob(spec));
  spec.overrides = {{"*", 8}};
  ASSERT_OK_AND_ASSIGN(const JobPlan eight, PlanJob(spec));
  const int64_t weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128);
  EXPECT_EQ(eight.disk_bytes_needed - two.disk_bytes_needed,
            weights * 6 / 8 + weights / 32 * 6 / 8);
}

TEST_F(OverridesTest, AreRefusedWhereTheyCannotBeMeant) {
  const auto plan = [&](std::vector<BitsOverride> overrides) {
    JobSpec spec = TinyJob();
    spec.overrides = std::move(overrides);
    return PlanJob(spec);
  };
  EXPECT_OK(plan({{"layers.{0,1}.*", 4}}));
  const auto refused = [](const char* what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what));
  };
  EXPECT_THAT(plan({{"*", 4}, {"layers.2.*", 4}}),
              refused("override 'layers.2.*' matches no linear of the model: their names go from "
                      "layers.0.self_attn.q_proj to layers.1.mlp.down_proj"));
  EXPECT_THAT(plan({{"layers.{0.*", 4}}), refused("'layers.{0.*': character 8"));
  EXPECT_THAT(plan({{"*", 5}}), refused("override '*': bits 5"));
}

}  // namespace
}  // namespace walsh::pipeline
