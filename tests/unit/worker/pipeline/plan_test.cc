#include "worker/pipeline/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "tests/unit/worker/pipeline/job_fixture.h"

namespace walsh::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

class PlanJobTest : public testing::JobTest {};

TEST_F(PlanJobTest, AutoGroupIsTheLargestThatDividesEveryInput) {
  JobSpec spec = TinyJob({.hidden = 128, .intermediate = 256, .n_heads = 8});
  ASSERT_OK_AND_ASSIGN(const JobPlan wide, PlanJob(spec));
  EXPECT_EQ(wide.group_size, 128);
  EXPECT_EQ(wide.rotation_block, 128);
  EXPECT_EQ(wide.layers, 2);
  EXPECT_EQ(wide.architecture, "LlamaForCausalLM");
  EXPECT_THAT(wide.warnings, IsEmpty());

  spec = TinyJob({.hidden = 64, .intermediate = 96});
  ASSERT_OK_AND_ASSIGN(const JobPlan narrow, PlanJob(spec));
  EXPECT_EQ(narrow.group_size, 32);
  EXPECT_EQ(narrow.rotation_block, 32);

  spec.quantizer.group_size = -1;
  ASSERT_OK_AND_ASSIGN(const JobPlan per_channel, PlanJob(spec));
  EXPECT_EQ(per_channel.group_size, -1);
  EXPECT_EQ(per_channel.rotation_block, 64);
}

TEST_F(PlanJobTest, RefusesOptionsThatDoNotFitTheModel) {
  const JobSpec good = TinyJob({.hidden = 96, .intermediate = 128, .n_heads = 6, .n_kv_heads = 2});
  ASSERT_OK(PlanJob(good));
  JobSpec spec = good;
  spec.quantizer.group_size = 64;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                      AllOf(HasSubstr("64"), HasSubstr("96"))));
  spec.quantizer.group_size = 48;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("48")));
  spec = good;
  spec.quantizer.bits = 5;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bits 5")));
  spec = good;
  spec.quantizer.damp = 7;
  EXPECT_THAT(PlanJob(spec), HasCode(absl::StatusCode::kInvalidArgument));
  spec = good;
  spec.rotation_block = 64;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("64")));
  spec.rotation_block = 16;
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec));
  EXPECT_EQ(plan.rotation_block, 16);
  spec.rotation = rotate::Kind::kNone;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block")));
  spec = good;
  spec.n_calibration_windows = 0;
  EXPECT_THAT(PlanJob(spec), HasCode(absl::StatusCode::kInvalidArgument));
  spec = good;
  spec.sequence_length = 16;
  EXPECT_THAT(PlanJob(spec),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sequence length 16")));
  spec = good;
  spec.source_path = directory_ / "none";
  EXPECT_THAT(PlanJob(spec), HasCode(absl::StatusCode::kNotFound));
}

// 96 = 12 · 8 has a Hadamard matrix, 736 = 92 · 8 has none here.
TEST_F(PlanJobTest, GlobalRotationsNeedAMatrixOfTheWidth) {
  for (rotate::Kind kind : {rotate::Kind::kHadamard, rotate::Kind::kWalsh}) {
    JobSpec spec = TinyJob({.hidden = 96});
    spec.rotation = kind;
    EXPECT_OK(PlanJob(spec));
    spec = TinyJob({.hidden = 736});
    spec.rotation = kind;
    EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                        AllOf(HasSubstr("736"), HasSubstr("gsr"))));
  }
}

TEST_F(PlanJobTest, InputsThatCannotBePackedAreRefused) {
  const JobSpec spec = TinyJob({.hidden = 64, .intermediate = 172});
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                      AllOf(HasSubstr("172"), HasSubstr("32"))));
}

TEST_F(PlanJobTest, UnknownArchitectureIsUnimplemented) {
  const JobSpec spec = TinyJob({}, testing::Damage::kUnknownArchitecture);
  EXPECT_THAT(PlanJob(spec), HasCode(absl::StatusCode::kUnimplemented));
}

TEST_F(PlanJobTest, WarnsOfWhatItChangesOrCannotDo) {
  JobSpec spec = TinyJob({.max_position = 128});
  spec.sequence_length = 2048;
  spec.n_calibration_windows = 100;
  ASSERT_OK_AND_ASSIGN(const JobPlan reduced, PlanJob(spec));
  EXPECT_THAT(reduced.warnings, Contains(AllOf(HasSubstr("2048"), HasSubstr("128"))));
  spec.n_calibration_windows = 1;
  spec.sequence_length = 32;
  ASSERT_OK_AND_ASSIGN(const JobPlan starved, PlanJob(spec));
  EXPECT_THAT(starved.warnings, Contains(HasSubstr("only 32 calibration tokens")));

  spec = TinyJob({.hidden = 64, .n_heads = 8, .n_kv_heads = 8, .head_dim = 92});
  ASSERT_OK_AND_ASSIGN(const JobPlan odd_head, PlanJob(spec));
  EXPECT_THAT(odd_head.warnings, Contains(AllOf(HasSubstr("R2"), HasSubstr("92"))));
}

// R2: with a rotation of the residual stream unless told otherwise, and without one where asked.
TEST_F(PlanJobTest, HeadsAreRotatedAsAskedFor) {
  const auto resolve = [](const JobSpec& spec) -> absl::StatusOr<ResolvedJob> {
    const auto checkpoint = Checkpoint::Open(spec.source_path);
    if (!checkpoint.ok()) return checkpoint.status();
    return Resolve(spec, **checkpoint);
  };
  JobSpec spec = TinyJob();
  spec.online.kv_bits = 4;
  for (const rotate::Kind kind : {rotate::Kind::kNone, rotate::Kind::kGsr}) {
    const bool has_residual = kind != rotate::Kind::kNone;
    spec.rotation = kind;
    for (const std::optional<bool> asked :
         {std::optional<bool>(), std::optional(false), std::optional(true)}) {
      spec.head_rotation = asked;
      ASSERT_OK_AND_ASSIGN(const ResolvedJob job, resolve(spec));
      const bool is_on = asked.value_or(has_residual);
      EXPECT_EQ(!job.r2.is_identity(), is_on);
      EXPECT_EQ(job.rotates(), is_on || has_residual);
      // R3 is where anything is rotated.
      EXPECT_EQ(job.online.query_key.block != 0, is_on || has_residual);
    }
  }
  spec = TinyJob({.hidden = 64, .n_heads = 8, .n_kv_heads = 8, .head_dim = 92});
  spec.head_rotation = true;
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                      AllOf(HasSubstr("R2"), HasSubstr("order 92"))));
  spec.head_rotation = false;
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec));
  EXPECT_THAT(plan.warnings, ::testing::Not(Contains(HasSubstr("R2"))));
}

// A block spreads what stands out of an activation over its own channels only.
TEST_F(PlanJobTest, WarnsOfLocalRotationsBeneathFourBitActivations) {
  const auto warnings = [](const JobSpec& spec) {
    const auto plan = PlanJob(spec);
    EXPECT_OK(plan);
    return plan.ok() ? plan->warnings : std::vector<std::string>();
  };
  const auto warned = Contains(AllOf(HasSubstr("activations of 4 bits"), HasSubstr("width 64")));
  JobSpec good = TinyJob();
  good.rotation = rotate::Kind::kGsr;
  good.rotation_block = 32;
  good.quantizer.bits = 4;
  good.online.activation_bits = 4;
  EXPECT_THAT(warnings(good), warned);
  JobSpec spec = good;
  spec.rotation = rotate::Kind::kWalsh;
  spec.rotation_block = 0;
  EXPECT_THAT(warnings(spec), IsEmpty());
  spec = good;
  spec.online.activation_bits = 8;
  EXPECT_THAT(warnings(spec), IsEmpty());
  // The weights decide there, and a group of a block sees none of the others.
  spec = good;
  spec.quantizer.bits = 2;
  EXPECT_THAT(warnings(spec), IsEmpty());
  spec = good;
  spec.online.activation_group = 32;
  EXPECT_THAT(warnings(spec), IsEmpty());
}

// Beyond 2 GiB outputs are computed a second time instead of being kept.
TEST_F(PlanJobTest, KeptOutputsAreCapped) {
  constexpr int64_t kFloat = 4, kHidden = 64, kIntermediate = 128, kLength = 2048;
  JobSpec spec = TinyJob({.hidden = kHidden, .intermediate = kIntermediate, .max_position = 2048});
  spec.sequence_length = kLength;
  spec.evaluate = false;
  spec.quantizer.error_propagation = 0;
  const auto needed = [&](int64_t n_windows) {
    spec.n_calibration_windows = n_windows;
    const auto plan = PlanJob(spec);
    EXPECT_OK(plan);
    return plan->memory_bytes_needed;
  };
  const int64_t cap = kKeptBytesMax / (kLength * kIntermediate * kFloat);
  ASSERT_EQ(cap, 2048);
  const int64_t per_window = kLength * (kHidden * kFloat + 4);  // hidden states and the ids
  EXPECT_EQ(needed(cap) - needed(cap - 1), per_window + kLength * kIntermediate * kFloat);
  EXPECT_EQ(needed(cap + 1) - needed(cap), per_window);
  EXPECT_EQ(needed(8192) - needed(4096), 4096 * per_window);
  // The original model's hidden states and outputs beside the rounded one's.
  const int64_t alone = needed(4096);
  spec.quantizer.error_propagation = 0.5;
  EXPECT_GE(needed(4096) - alone, 4096 * kLength * kHidden * kFloat + kKeptBytesMax);
}

TEST_F(PlanJobTest, CountsEvaluationAndItsWindowsAndTheTexts) {
  JobSpec spec = TinyJob({.max_position = 8192});
  ASSERT_OK_AND_ASSIGN(const JobPlan small, PlanJob(spec));
  spec.n_evaluation_windows = 4096;
  spec.evaluation_length = 8192;
  ASSERT_OK_AND_ASSIGN(const JobPlan many, PlanJob(spec));
  EXPECT_GT(many.memory_bytes_needed, small.memory_bytes_needed + int64_t{4096} * 8192 * 64 * 4);

  spec = TinyJob({.max_position = 8192});
  spec.calibration_path = directory_ / "large.jsonl";
  std::ofstream(spec.calibration_path).close();
  std::filesystem::resize_file(spec.calibration_path, 400 << 20);  // sparse
  ASSERT_OK_AND_ASSIGN(const JobPlan large, PlanJob(spec));
  EXPECT_GT(large.memory_bytes_needed, 800 << 20);
}

// An item's keys, values and hidden states beside a layer, and the file's text and ids all the
// time.
TEST_F(PlanJobTest, CountsTasksOnce) {
  JobSpec spec = TinyJob({.max_position = 65536});
  spec.n_calibration_windows = 1;
  ASSERT_OK_AND_ASSIGN(const JobPlan none, PlanJob(spec));
  const std::string path = directory_ / "task.jsonl";
  std::ofstream(path) << R"({"context": ")" << std::string(60000, 'a')
                      << R"(", "continuation": "b"})";
  spec.tasks = {{.path = path}};
  ASSERT_OK_AND_ASSIGN(const JobPlan large, PlanJob(spec));
  EXPECT_GT(large.memory_bytes_needed, none.memory_bytes_needed + 60000 * 64 * 4);
  spec.tasks = {{.path = directory_ / "none.jsonl"}};
  EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kNotFound, HasSubstr("task 1: ")));
  spec.evaluate = false;
  EXPECT_OK(PlanJob(spec));
}

// A thousand bytes of plain text are a thousand tokens at most, whatever is asked for; what rows
// become when they are joined, and chats when they are rendered, is longer.
TEST_F(PlanJobTest, CountsNoMoreEvaluationWindowsThanTheFileHas) {
  JobSpec spec = TinyJob({.max_position = 8192});
  spec.evaluation_length = 100;
  spec.evaluation_path = directory_ / "text.txt";
  std::ofstream(spec.evaluation_path) << std::string(1000, 'a');
  const auto needed = [&](int64_t n_windows) {
    spec.n_evaluation_windows = n_windows;
    return PlanJob(spec)->memory_bytes_needed;
  };
  EXPECT_LT(needed(9), needed(10));
  EXPECT_EQ(needed(10), needed(4096));
  spec.evaluation_stride = 50;
  EXPECT_LT(needed(18), needed(19));
  EXPECT_EQ(needed(19), needed(4096));
  spec.evaluation_stride = 0;
  spec.evaluation_joins_rows = true;
  EXPECT_LT(needed(29), needed(30));
  EXPECT_EQ(needed(30), needed(4096));
  spec.evaluation_joins_rows = false;
  spec.evaluation_name = "text.jsonl";
  EXPECT_LT(needed(4095), needed(4096));
}

TEST_F(PlanJobTest, AStrideIsAtMostAWindow) {
  JobSpec spec = TinyJob();
  spec.evaluation_stride = spec.evaluation_length;
  EXPECT_OK(PlanJob(spec));
  for (const int64_t stride : {spec.evaluation_length + 1, int64_t{-1}}) {
    spec.evaluation_stride = stride;
    EXPECT_THAT(PlanJob(spec),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("evaluation stride")));
  }
}

// No float of it but one layer's: what grows with the layers is a byte and a bit for each weight.
TEST_F(PlanJobTest, OwnTextNeedsTheModelAt8Bits) {
  const auto needed = [&](int64_t n_layers) {
    JobSpec spec = TinyJob({.hidden = 128,
                            .intermediate = 128,
                            .n_layers = n_layers,
                            .n_heads = 4,
                            .n_kv_heads = 1,
                            .head_dim = 32,
                            .max_position = 64});
    spec.calibration_path.clear();
    spec.n_calibration_windows = 1;
    spec.evaluate = false;
    const auto plan = PlanJob(spec);
    EXPECT_OK(plan);
    return plan->memory_bytes_needed;
  };
  const int64_t weights = 128 * (2 * 128 + 2 * 32 + 3 * 128);
  const int64_t growth = needed(64) - needed(32);
  EXPECT_GT(growth, 32 * weights);
  EXPECT_LT(growth, 32 * weights * 3 / 2);
}

TEST_F(PlanJobTest, MemoryGrowsWithCalibrationAndNotWithLayers) {
  JobSpec spec = TinyJob({.n_layers = 2});
  ASSERT_OK_AND_ASSIGN(const JobPlan small, PlanJob(spec));
  spec.n_calibration_windows = 4096;
  ASSERT_OK_AND_ASSIGN(const JobPlan more_text, PlanJob(spec));
  EXPECT_GT(more_text.memory_bytes_needed, small.memory_bytes_needed + (32 << 20));
  spec = TinyJob({.n_layers = 8});
  ASSERT_OK_AND_ASSIGN(const JobPlan deep, PlanJob(spec));
  EXPECT_EQ(deep.memory_bytes_needed, small.memory_bytes_needed);
  EXPECT_GT(deep.disk_bytes_needed, small.disk_bytes_needed);
}

}  // namespace
}  // namespace walsh::pipeline
