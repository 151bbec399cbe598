#include "worker/pipeline/artifact_report.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

namespace walsh::pipeline {
namespace {

TEST(QualityReportTest, HasTheDivergenceWhereItWasMeasured) {
  JobReport report;
  const JobTexts texts{.evaluation = {.length = 2, .ids = {0, 1}}};
  EXPECT_FALSE(QualityReport({}, texts, report).contains("kl_divergence"));
  EXPECT_FALSE(QualityReport({}, texts, report).contains("top1_agreement"));
  report.kl_divergence = 0;
  report.top1_agreement = 1;
  EXPECT_EQ(QualityReport({}, texts, report)["kl_divergence"], 0.0);
  EXPECT_EQ(QualityReport({}, texts, report)["top1_agreement"], 1.0);
}

TEST(QualityReportTest, TellsHowWindowsLie) {
  const JobTexts texts{.evaluation = {.length = 2, .ids = {0, 1}}};
  nlohmann::json quality = QualityReport({.evaluation_stride = 2}, texts, {});
  EXPECT_EQ(quality["stride"], 2);
  EXPECT_EQ(quality["text"], "windows without overlap, first token of each not predicted");
  quality = QualityReport({.evaluation_stride = 1}, texts, {});
  EXPECT_EQ(quality["stride"], 1);
  EXPECT_EQ(quality["text"], "overlapping windows, each token predicted once");
}

// Tasks alone, where the text was too short.
TEST(QualityReportTest, HasTheTasks) {
  JobReport report;
  report.tasks = {{.before = {.name = "t", .items = 3, .score = {.accuracy = {0.5, 0.25}}},
                   .after = {.name = "t",
                             .items = 3,
                             .score = {.accuracy = {0.25, 0.125},
                                       .accuracy_norm = evaluate::Estimate{0.75, 0.0625},
                                       .tokens = 12}}}};
  const nlohmann::json expected = {{"name", "t"},
                                   {"items", 3},
                                   {"tokens", 12},
                                   {"truncated_items", 0},
                                   {"before", {{"accuracy", 0.5}, {"accuracy_stderr", 0.25}}},
                                   {"after",
                                    {{"accuracy", 0.25},
                                     {"accuracy_stderr", 0.125},
                                     {"accuracy_norm", 0.75},
                                     {"accuracy_norm_stderr", 0.0625}}}};
  EXPECT_EQ(QualityReport({}, {}, report), (nlohmann::json{{"tasks", {expected}}}));
}

// Readers take the first regular expression that matches the module, and JSON members have no
// order: no two match one module. Readers that fuse linears ask by the name of the whole.
TEST(QuantizationConfigTest, OverridesAreWrittenForOtherReaders) {
  ModelConfig model;
  model.n_layers = 12;
  ResolvedJob job;
  job.quantizer.bits = 2;
  EXPECT_FALSE(QuantizationConfig({}, model, job).contains("dynamic"));
  job.bits.assign(12, std::vector<int>(7, 2));
  EXPECT_FALSE(QuantizationConfig({}, model, job).contains("dynamic"));
  job.bits[0] = {4, 4, 4, 2, 8, 8, 3};
  job.bits[1] = {4, 4, 2, 2, 8, 4, 3};
  job.bits[11] = {4, 4, 4, 2, 2, 8, 3};
  const nlohmann::json expected = {
      {R"(+:^model\.layers\.(?:0|11)\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$)",
       {{"bits", 4}}},
      {R"(+:^model\.layers\.(?:1)\.self_attn\.q_proj$)", {{"bits", 4}}},
      {R"(+:^model\.layers\.(?:1)\.self_attn\.k_proj$)", {{"bits", 4}}},
      {R"(+:^model\.layers\.(?:0)\.mlp\.(?:gate_proj|up_proj|gate_up_proj)$)", {{"bits", 8}}},
      {R"(+:^model\.layers\.(?:1)\.mlp\.gate_proj$)", {{"bits", 8}}},
      {R"(+:^model\.layers\.(?:1)\.mlp\.up_proj$)", {{"bits", 4}}},
      {R"(+:^model\.layers\.(?:11)\.mlp\.up_proj$)", {{"bits", 8}}},
      {R"(+:^model\.layers\.(?:0|1|11)\.mlp\.down_proj$)", {{"bits", 3}}},
  };
  EXPECT_EQ(QuantizationConfig({}, model, job)["dynamic"], expected);
}

// transformers' GPTQConfig and vLLM take no configuration without "bits", GPTQModel no format that
// it does not know.
TEST(QuantizationConfigTest, OwnGridsAreNoOtherReaders) {
  ResolvedJob job;
  job.quantizer.bits = 2;
  EXPECT_EQ(QuantizationConfig({}, {}, job)["checkpoint_format"], "gptq_v2");
  job.quantizer.grid = gptq::Grid::kCodebook;
  nlohmann::json config = QuantizationConfig({}, {}, job);
  EXPECT_EQ(config["checkpoint_format"], "walsh");
  EXPECT_FALSE(config.contains("bits"));
  EXPECT_EQ(config["walsh"], (nlohmann::json{{"grid", "codebook"}, {"bits", 2}}));
  job.quantizer.grid = gptq::Grid::kUniform;
  job.quantizer.zero_point = gptq::ZeroPoint::kFloat;
  config = QuantizationConfig({}, {}, job);
  EXPECT_EQ(config["checkpoint_format"], "walsh");
  EXPECT_EQ(config["walsh"]["grid"], "float-zero");
}

TEST(QuantizationConfigTest, OnlyColumnsWithAnOrderHaveStaticGroups) {
  ResolvedJob job;
  job.quantizer.column_order = gptq::ColumnOrder::kActOrder;
  for (const auto& [method, has_static_groups] :
       {std::pair(gptq::Method::kGptq, true), std::pair(gptq::Method::kGptaq, true),
        std::pair(gptq::Method::kRtn, false)}) {
    job.quantizer.method = method;
    EXPECT_EQ(QuantizationConfig({}, {}, job)["static_groups"], has_static_groups);
  }
}

}  // namespace
}  // namespace walsh::pipeline
