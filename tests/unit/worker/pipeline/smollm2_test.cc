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

  // What the job held, against what it was said to hold.
  static void ExpectPlanned(const JobPlan& plan, const JobReport& report) {
    EXPECT_LT(report.peak_memory_bytes, plan.memory_bytes_needed * 5 / 4);
    EXPECT_GT(report.peak_memory_bytes, plan.memory_bytes_needed / 2);
    RecordProperty("peak_mib", static_cast<int>(report.peak_memory_bytes >> 20));
    RecordProperty("planned_mib", static_cast<int>(plan.memory_bytes_needed >> 20));
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
  ExpectPlanned(plan, gptq);
  // The float model alone has 540 MB.
  EXPECT_LT(gptq.peak_memory_bytes, int64_t{700} << 20);
  spec_.quantizer.method = gptq::Method::kRtn;
  const JobReport rtn = RunOnce();
  testing::ExpectErrorsBelow(gptq, rtn, 0.95, 0.80);
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

// docs/quality.md: rows with their line ends, blank ones made empty, joined by a blank line.
std::string WikiText2Test(const std::string& raw_path) {
  std::ifstream raw(raw_path, std::ios::binary);
  std::string text, row;
  for (bool is_first = true; std::getline(raw, row); is_first = false) {
    if (!is_first) text += "\n\n";
    if (row.find_first_not_of(" \t\r") != std::string::npos) text += row + "\n";
  }
  return text;
}

TEST_F(SmolLm2Test, FourBitsStayWithinEightPercentOfTheBaselinesPerplexity) {
  WALSH_REQUIRE_DATA(raw, "corpora/wiki.test.raw");
  const std::string text = WikiText2Test(raw);
  ASSERT_EQ(Sha256Hex(text), "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
  spec_.evaluation_path = directory_ / "wikitext-2-test.txt";
  std::ofstream(spec_.evaluation_path, std::ios::binary) << text;
  spec_.quantizer.bits = 4;
  spec_.quantizer.group_size = 64;
  spec_.n_calibration_windows = 32;
  spec_.sequence_length = 512;
  spec_.evaluate = true;
  spec_.n_evaluation_windows = 20;
  spec_.evaluation_length = 2048;
  ASSERT_EQ(spec_.rotation, rotate::Kind::kGsr);
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
  const JobReport report = RunOnce();
  ASSERT_EQ(report.evaluation_tokens, 20 * 2047);
  ASSERT_EQ(report.calibration_tokens, 32 * 512);
  // A baseline that is off would make any ratio possible.
  EXPECT_GT(report.perplexity_before, 10);
  EXPECT_LT(report.perplexity_before, 30);
  EXPECT_LE(report.perplexity_after, 1.08 * report.perplexity_before);
  RecordProperty("perplexity_before", std::to_string(report.perplexity_before));
  RecordProperty("perplexity_after", std::to_string(report.perplexity_after));
  ExpectPlanned(plan, report);
}

}  // namespace
}  // namespace walsh::pipeline
