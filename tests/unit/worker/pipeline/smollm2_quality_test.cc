// What 4 bits may cost SmolLM2-135M (label quality: ten minutes and more on two cores).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/unit/worker/pipeline/smollm2_fixture.h"

namespace walsh::pipeline {
namespace {

class SmolLm2QualityTest : public SmolLm2Test {
 protected:
  // The first 20 windows of 2,048 tokens of the WikiText-2 test; 32 windows of calibration.
  void ExpectFourBitsWithin(double ratio_max, int64_t calibration_length) {
    EvaluateOnWikiText2();
    if (IsSkipped() || HasFatalFailure()) return;
    spec_.quantizer.bits = 4;
    spec_.quantizer.group_size = 64;
    spec_.n_calibration_windows = 32;
    spec_.sequence_length = calibration_length;
    spec_.evaluate = true;
    spec_.n_evaluation_windows = 20;
    spec_.evaluation_length = 2048;
    ASSERT_EQ(spec_.rotation, rotate::Kind::kGsr);
    ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec_));
    const JobReport report = RunOnce();
    ASSERT_EQ(report.evaluation_tokens, 20 * 2047);
    ASSERT_EQ(report.calibration_tokens, 32 * calibration_length);
    // A baseline that is off would make any ratio possible.
    EXPECT_GT(report.perplexity_before, 10);
    EXPECT_LT(report.perplexity_before, 30);
    EXPECT_LE(report.perplexity_after, ratio_max * report.perplexity_before);
    RecordProperty("perplexity_before", std::to_string(report.perplexity_before));
    RecordProperty("perplexity_after", std::to_string(report.perplexity_after));
    ExpectPlanned(plan, report);
  }
};

// The calibration of docs/quality.md's tables, a quarter of the product's default.
TEST_F(SmolLm2QualityTest, FourBitsStayWithinEightPercentOfTheBaselinesPerplexity) {
  ExpectFourBitsWithin(1.08, 2048);
}

// A sixteenth of the default misses that by a thousandth, and must not get worse.
TEST_F(SmolLm2QualityTest, FourBitsOfAShortCalibrationStayWithinNinePercent) {
  ExpectFourBitsWithin(1.09, 512);
}

}  // namespace
}  // namespace walsh::pipeline
