// The thresholds on SmolLM2-135M (label slow: minutes).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/pipeline/plan.h"

namespace walsh::pipeline {
namespace {

constexpr rotate::Kind kRotations[] = {rotate::Kind::kHadamard, rotate::Kind::kWalsh,
                                       rotate::Kind::kLocalHadamard, rotate::Kind::kGsr};

class SmolLm2Test : public testing::JobTest {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_SMOLLM2(model);
    WALSH_REQUIRE_DATA(corpus, "corpora/wikitext-train-1000.json");
    spec_.job_name = "jobs/1";
    spec_.model_name = "smollm2";
    spec_.source_path = model;
    spec_.calibration_path = corpus;
    spec_.quantizer.group_size = 0;
    spec_.n_calibration_windows = 16;
    spec_.sequence_length = 256;
    spec_.evaluate = false;
    spec_.output_directory = directory_ / "out";
  }

  JobReport RunOnce() {
    auto report = Run(spec_, ThreadPool::HardwareThreads());
    EXPECT_OK(report);
    std::filesystem::remove_all(spec_.output_directory);
    return *std::move(report);
  }

  JobSpec spec_;
};

// The five rotations of width 576 = 36 · 16; the job stops after the gate.
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
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
  spec_.quantizer.bits = 3;
  const JobReport gptq = RunOnce();
  // The float model alone has 540 MB.
  EXPECT_LT(gptq.peak_memory_bytes, plan.memory_bytes_needed * 5 / 4);
  EXPECT_LT(gptq.peak_memory_bytes, int64_t{700} << 20);
  spec_.quantizer.method = gptq::Method::kRtn;
  const JobReport rtn = RunOnce();
  testing::ExpectErrorsBelow(gptq, rtn, 0.95, 0.80);
}

}  // namespace
}  // namespace walsh::pipeline
