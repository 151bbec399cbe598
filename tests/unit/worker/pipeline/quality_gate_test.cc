#include "worker/pipeline/quality_gate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/testing/status_matchers.h"

namespace walsh::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::StatusIs;

constexpr absl::StatusCode kFailed = absl::StatusCode::kFailedPrecondition;

JobReport Report(double before, double after, double kl_divergence) {
  JobReport report;
  report.perplexity_before = before;
  report.perplexity_after = after;
  report.kl_divergence = kl_divergence;
  report.evaluation_tokens = 100;
  return report;
}

TEST(CheckQualityTest, WithoutLimitsEverythingPasses) {
  EXPECT_OK(CheckQuality({}, Report(10, 1000, 50)));
  EXPECT_OK(CheckQuality({}, JobReport()));
}

TEST(CheckQualityTest, AtTheLimitPassesAndAboveItFails) {
  const QualityGate gate{.max_perplexity_ratio = 1.25, .max_kl_divergence = 0.5};
  EXPECT_OK(CheckQuality(gate, Report(8, 10, 0.5)));
  EXPECT_OK(CheckQuality(gate, Report(8, 7, 0)));
  EXPECT_THAT(CheckQuality(gate, Report(8, 10.01, 0.5)),
              StatusIs(kFailed, AllOf(HasSubstr("perplexity 10.01 is 1.251 times the original's 8, "
                                                "at most 1.25 times is allowed"),
                                      Not(HasSubstr("KL")))));
  EXPECT_THAT(CheckQuality(gate, Report(8, 10, 0.5001)),
              StatusIs(kFailed, HasSubstr("0.5001 nats a token, at most 0.5 is allowed")));
  EXPECT_THAT(CheckQuality(gate, Report(8, 20, 2)),
              StatusIs(kFailed, AllOf(HasSubstr("2.5 times"), HasSubstr("2 nats"))));
}

TEST(CheckQualityTest, EachLimitStandsAlone) {
  EXPECT_OK(CheckQuality({.max_perplexity_ratio = 3}, Report(8, 20, 2)));
  EXPECT_OK(CheckQuality({.max_kl_divergence = 3}, Report(8, 80, 2)));
}

TEST(CheckQualityTest, WhatWasNotMeasuredFails) {
  EXPECT_THAT(CheckQuality({.max_perplexity_ratio = 2}, JobReport()),
              StatusIs(kFailed, HasSubstr("was not evaluated")));
  EXPECT_THAT(CheckQuality({.max_kl_divergence = 2}, Report(8, 8, -1)),
              StatusIs(kFailed, HasSubstr("was not measured")));
  EXPECT_THAT(CheckQuality({.max_perplexity_ratio = 2}, Report(8, NAN, 0)),
              StatusIs(kFailed, HasSubstr("perplexity nan")));
}

TEST(GateWarningTest, AFewTokensAreSaid) {
  const QualityGate gate{.max_perplexity_ratio = 1.25, .max_kl_divergence = {}};
  EXPECT_THAT(GateWarning(gate, Report(8, 9, 0)), HasSubstr("on 100 tokens, fewer than 2048"));
  EXPECT_EQ(GateWarning({}, Report(8, 9, 0)), "") << "nothing was judged";
  JobReport report = Report(8, 9, 0);
  report.evaluation_tokens = 2048;
  EXPECT_EQ(GateWarning(gate, report), "");
}

}  // namespace
}  // namespace walsh::pipeline
