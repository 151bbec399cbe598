#include "worker/pipeline/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
  // 96 = 3 · 32 has no global Hadamard matrix.
  for (rotate::Kind kind : {rotate::Kind::kHadamard, rotate::Kind::kWalsh}) {
    spec = good;
    spec.rotation = kind;
    EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("gsr")));
  }
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

  spec = TinyJob({.hidden = 64, .n_heads = 2, .n_kv_heads = 2, .head_dim = 48});
  ASSERT_OK_AND_ASSIGN(const JobPlan odd_head, PlanJob(spec));
  EXPECT_THAT(odd_head.warnings, Contains(AllOf(HasSubstr("R2"), HasSubstr("48"))));
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
