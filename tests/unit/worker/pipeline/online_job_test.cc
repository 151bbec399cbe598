// Jobs whose models rotate and round at run time: what is calibrated, written, evaluated and served
// is the same.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status_macros.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "tests/unit/worker/pipeline/served_logits.h"
#include "worker/io/artifact.h"
#include "worker/pipeline/plan.h"

namespace walsh::pipeline {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::walsh::testing::EvaluatedLogits;
using ::walsh::testing::RelativeDifference;
using ::walsh::testing::ServedLogits;
using ::walsh::testing::StatusIs;

class OnlineJobTest : public testing::JobTest {
 protected:
  JobSpec OnlineJob(int activation_bits, int kv_bits, int64_t intermediate = 128) {
    JobSpec spec = TinyJob({.intermediate = intermediate});
    spec.online.down_rotation = rotate::Kind::kGsr;
    spec.online.activation_bits = activation_bits;
    spec.online.kv_bits = kv_bits;
    return spec;
  }

  absl::StatusOr<ResolvedJob> ResolveJob(const JobSpec& spec) {
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                           Checkpoint::Open(spec.source_path));
    return Resolve(spec, *checkpoint);
  }

  nlohmann::json ReadJson(const std::string& name) {
    std::ifstream file(directory_ / ("out/" + name));
    return nlohmann::json::parse(file);
  }
};

TEST_F(OnlineJobTest, ArtifactSaysWhatItNeeds) {
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(OnlineJob(4, 2)));
  EXPECT_EQ(report.online_block, 64);
  EXPECT_GT(report.rotation_gate, 0);
  EXPECT_LT(report.rotation_gate, 1e-5);
  const nlohmann::json quantization = ReadJson("config.json")["quantization_config"];
  EXPECT_FALSE(quantization.contains("quant_method"));
  EXPECT_EQ(quantization["checkpoint_format"], "walsh");
  const nlohmann::json expected = nlohmann::json::parse(R"({
      "down_proj_input": {"matrix": "walsh", "block": 64},
      "query_key": {"matrix": "walsh", "block": 16},
      "activations": {"bits": 4, "group_size": -1, "symmetric": true, "clip_ratio": 0.9},
      "kv_cache": {"bits": 2, "group_size": 16, "symmetric": false, "clip_ratio": 0.95}})");
  EXPECT_EQ(quantization["online_transforms"], expected);
  EXPECT_EQ(ReadJson("walsh.json")["online_transforms"], expected);
  ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(directory_ / "out", true, 1));
  EXPECT_EQ(OnlineTransformsJson(artifact->online()), expected);
}

TEST_F(OnlineJobTest, WithoutOnlineTransformsItIsPlainGptq) {
  ASSERT_OK(Run(TinyJob()));
  const nlohmann::json quantization = ReadJson("config.json")["quantization_config"];
  EXPECT_EQ(quantization["quant_method"], "gptq");
  EXPECT_EQ(quantization["checkpoint_format"], "gptq_v2");
  EXPECT_FALSE(quantization.contains("online_transforms"));
}

// Options that do nothing in such a job are not told as if they had.
TEST_F(OnlineJobTest, ReportTellsWhatActed) {
  JobSpec spec = TinyJob();
  spec.evaluate = false;
  spec.quantizer.method = gptq::Method::kRtn;
  spec.quantizer.column_order = gptq::ColumnOrder::kActOrder;
  spec.rotation = rotate::Kind::kNone;
  spec.rotation_signs = true;
  ASSERT_OK(Run(spec));
  nlohmann::json report = ReadJson("walsh.json");
  EXPECT_EQ(report["rotation"]["signs"], "none");
  EXPECT_TRUE(report["quantization"]["damp"].is_null());
  EXPECT_TRUE(report["quantization"]["column_order"].is_null());
  EXPECT_EQ(report["quantization"]["mse_clip"], true);
  EXPECT_EQ(report["quantization"]["zero_point"], "integer");
  std::filesystem::remove_all(spec.output_directory);
  spec.quantizer = {.bits = 2, .group_size = 32, .grid = gptq::Grid::kCodebook};
  spec.rotation = rotate::Kind::kGsr;
  ASSERT_OK(Run(spec));
  report = ReadJson("walsh.json");
  EXPECT_EQ(report["rotation"]["signs"], "seeded");
  EXPECT_EQ(report["quantization"]["damp"], 0.01);
  EXPECT_EQ(report["quantization"]["column_order"], "group-aware");
  EXPECT_TRUE(report["quantization"]["mse_clip"].is_null());
  EXPECT_TRUE(report["quantization"]["zero_point"].is_null());
}

TEST_F(OnlineJobTest, BytesDoNotDependOnThreads) {
  JobSpec spec = OnlineJob(4, 4, 192);
  spec.online.down_rotation = rotate::Kind::kWalsh;  // by the core of 12
  ASSERT_OK(Run(spec, 1));
  const auto first = Digests(spec.output_directory);
  spec.output_directory += "3";
  ASSERT_OK(Run(spec, 3));
  EXPECT_EQ(Digests(spec.output_directory), first);
}

std::vector<int32_t> Ids() {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 40; ++i) ids.push_back(i * 37 % 256);
  return ids;
}

// The engine's packed products round their inputs to 8 bits, which is all that may differ: some
// percent of the largest logit on random weights. At 8 bits a value that falls to the other side
// moves by as little; at 4 and 2 by a step that is a good part of it.
TEST_F(OnlineJobTest, ServesWhatItEvaluated) {
  struct Case {
    int activation_bits, kv_bits;
    double tolerance;
  };
  for (const auto [activation_bits, kv_bits, tolerance] :
       {Case{16, 16, 0.05}, Case{16, 8, 0.05}, Case{8, 8, 0.05}, Case{16, 4, 0.12},
        Case{16, 2, 0.2}, Case{4, 16, 0.3}, Case{4, 4, 0.4}}) {
    SCOPED_TRACE(::testing::Message() << activation_bits << " and " << kv_bits << " bits");
    JobSpec spec = OnlineJob(activation_bits, kv_bits, 192);
    spec.output_directory += std::to_string(activation_bits) + std::to_string(kv_bits);
    spec.online.down_rotation = rotate::Kind::kHadamard;
    ASSERT_OK(Run(spec));
    ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(spec.output_directory, true, 1));
    ASSERT_OK_AND_ASSIGN(const auto evaluated, EvaluatedLogits(*artifact, Ids()));
    for (const size_t step : {size_t{40}, size_t{7}, size_t{1}}) {
      ASSERT_OK_AND_ASSIGN(const auto served, ServedLogits(spec.output_directory, Ids(), step));
      EXPECT_LT(RelativeDifference(served, evaluated), tolerance) << step;
    }
    ASSERT_OK_AND_ASSIGN(const auto wrong, EvaluatedLogits(*artifact, Ids(), false));
    EXPECT_GT(RelativeDifference(wrong, evaluated), std::max(0.25, 1.5 * tolerance));
  }
}

TEST_F(OnlineJobTest, DefaultsAreResolved) {
  JobSpec spec = OnlineJob(8, 8);
  ASSERT_OK_AND_ASSIGN(ResolvedJob job, ResolveJob(spec));
  EXPECT_EQ(job.online.activations.clip_ratio, 1);
  EXPECT_EQ(job.online.kv_cache.clip_ratio, 1);
  EXPECT_EQ(job.online.kv_cache.group_size, 16);
  EXPECT_EQ(job.online.query_key.block, 16);
  EXPECT_EQ(job.online_block, 64);
  EXPECT_TRUE(job.rotates());

  spec.online.activation_clip = 0.8;
  spec.online.kv_clip = 0.7;
  spec.online.kv_group = 32;
  spec.online.down_block = 32;
  spec.online.query_key = false;
  ASSERT_OK_AND_ASSIGN(job, ResolveJob(spec));
  EXPECT_EQ(job.online.activations.clip_ratio, 0.8);
  EXPECT_EQ(job.online.kv_cache.clip_ratio, 0.7);
  EXPECT_EQ(job.online.kv_cache.group_size, 32);
  EXPECT_EQ(job.online.query_key.block, 0);
  EXPECT_EQ(job.online_block, 32);

  // Nothing is rotated where nothing is to be.
  spec = TinyJob();
  spec.rotation = rotate::Kind::kNone;
  spec.online.kv_bits = 4;
  ASSERT_OK_AND_ASSIGN(job, ResolveJob(spec));
  EXPECT_EQ(job.online.query_key.block, 0);
  EXPECT_FALSE(job.rotates());
  spec.online.query_key = true;
  ASSERT_OK_AND_ASSIGN(job, ResolveJob(spec));
  EXPECT_EQ(job.online.query_key.block, 16);
  EXPECT_TRUE(job.rotates());
}

TEST_F(OnlineJobTest, RefusesWhatMakesNoSense) {
  const auto refused = [&](const JobSpec& spec, const char* message) {
    EXPECT_THAT(ResolveJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  JobSpec spec = OnlineJob(16, 16);
  spec.online.query_key = true;
  refused(spec, "the KV cache is not quantized");
  spec = OnlineJob(16, 16);
  spec.online.down_rotation = rotate::Kind::kWalsh;
  spec.online.down_block = 64;
  refused(spec, "online rotation block 64 has no meaning for rotation walsh");
  spec = OnlineJob(16, 16);
  spec.online.down_block = 256;
  refused(spec, "rotation block 256 does not divide the width 128");
  spec = OnlineJob(16, 16, 736);  // 23 · 32
  spec.online.down_rotation = rotate::Kind::kHadamard;
  refused(spec, "no Hadamard matrix of order 736");
  refused(spec, "use online rotation gsr");
  spec = OnlineJob(4, 16);
  spec.online.activation_group = 128;
  refused(spec, "a group of 128 does not divide the width 64");
  spec = OnlineJob(16, 4);
  spec.online.kv_group = 64;
  refused(spec, "a group of 64 does not divide the width 32");
}

// A head of 92 = 4 · 23 has no Hadamard matrix: its keys stay as they are, unless asked for.
TEST_F(OnlineJobTest, KeysWithoutAMatrixAreNotRotated) {
  JobSpec spec = TinyJob({.n_heads = 8, .n_kv_heads = 8, .head_dim = 92});
  spec.online.kv_bits = 4;
  ASSERT_OK_AND_ASSIGN(const ResolvedJob job, ResolveJob(spec));
  EXPECT_EQ(job.online.query_key.block, 0);
  EXPECT_THAT(job.warnings, Contains(HasSubstr("(R3)")));
  spec.online.query_key = true;
  EXPECT_THAT(ResolveJob(spec),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("order 92")));
}

}  // namespace
}  // namespace walsh::pipeline
