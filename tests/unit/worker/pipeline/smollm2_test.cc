// The thresholds on SmolLM2-135M that take a few minutes (label slow).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/unit/worker/pipeline/smollm2_fixture.h"

namespace walsh::pipeline {
namespace {

constexpr rotate::Kind kRotations[] = {rotate::Kind::kHadamard, rotate::Kind::kWalsh,
                                       rotate::Kind::kLocalHadamard, rotate::Kind::kGsr};

// The four rotations of width 576 = 36 · 16; the job stops after the gate.
TEST_F(SmolLm2Test, EveryRotationLeavesTheLogitsUnchanged) {
  for (rotate::Kind rotation : kRotations) {
    spec_.rotation = rotation;
    bool is_past_gate = false;
    const auto report = Run(spec_, 2, [&](const JobProgress& progress) {
      is_past_gate = progress.stage == Stage::kCalibrating;
      return is_past_gate ? absl::CancelledError("past the gate") : absl::OkStatus();
    });
    EXPECT_TRUE(is_past_gate) << rotate::KindName(rotation) << ": " << report.status();
  }
}

TEST_F(SmolLm2Test, GptqBeatsRoundToNearestOnEveryLinearInBoundedMemory) {
  spec_.quantizer.bits = 3;
  spec_.quantizer.error_propagation = 0;  // both round the same weights
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
  const JobReport gptq = RunOnce();
  ExpectPlanned(plan, gptq);
  // The float model alone has 540 MB.
  EXPECT_LT(gptq.peak_memory_bytes, int64_t{700} << 20);
  spec_.quantizer.method = gptq::Method::kRtn;
  const JobReport rtn = RunOnce();
  testing::ExpectErrorsBelow(gptq, rtn, 0.95, 0.80);
}

// What a job does unless asked otherwise, in short; the bound of 8 % on the whole protocol is
// smollm2_quality_test.cc's.
TEST_F(SmolLm2Test, DefaultsAtFourBitsKeepTheModelInPlannedMemory) {
  ASSERT_EQ(spec_.quantizer.bits, 4);
  ASSERT_TRUE(PropagatesError(spec_.quantizer));
  ASSERT_EQ(spec_.rotation, rotate::Kind::kGsr);
  spec_.evaluate = true;
  spec_.n_evaluation_windows = 4;
  spec_.evaluation_length = 512;
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
  const JobReport report = RunOnce();
  ExpectPlanned(plan, report);
  EXPECT_GT(report.original_forward_seconds, 0);
  ASSERT_EQ(report.evaluation_tokens, 4 * 511);
  EXPECT_GT(report.perplexity_before, 5);
  EXPECT_LT(report.perplexity_before, 50);
  EXPECT_LT(report.perplexity_after, 1.25 * report.perplexity_before);
  RecordProperty("perplexity_before", std::to_string(report.perplexity_before));
  RecordProperty("perplexity_after", std::to_string(report.perplexity_after));
}

// No float copy of the whole model, which would add 400 MiB.
TEST_F(SmolLm2Test, OwnTextFitsItsPlan) {
  spec_.calibration_path.clear();
  spec_.n_calibration_windows = 4;
  spec_.sequence_length = 128;
  spec_.quantizer.method = gptq::Method::kRtn;
  spec_.quantizer.mse_clip = false;
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
  const JobReport report = RunOnce();
  ExpectPlanned(plan, report);
  EXPECT_LT(report.peak_memory_bytes, int64_t{600} << 20);
}

}  // namespace
}  // namespace walsh::pipeline
