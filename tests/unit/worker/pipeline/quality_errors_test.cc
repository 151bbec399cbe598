#include "worker/pipeline/quality_errors.h"

#include <gtest/gtest.h>

#include <cmath>

namespace walsh::pipeline {
namespace {

JobReport Report() {
  JobReport report;
  report.window_losses_before = {1, 2, 3, 6};
  report.window_losses_after = {1.5, 2.4, 3.5, 6.6};
  report.perplexity_before = std::exp(3.0);
  report.perplexity_after = std::exp(3.5);
  return report;
}

// By hand: losses before have Σ (x − x̄)² = 14, those after 14.82, differences 0.02.
TEST(StandardErrorsTest, OfMeansOverTheWindows) {
  JobReport report = Report();
  auto errors = StandardErrors(report);
  ASSERT_TRUE(errors.has_value());
  EXPECT_NEAR(errors->perplexity_before, std::exp(3.0) * std::sqrt(14.0 / 12), 1e-9);
  EXPECT_NEAR(errors->perplexity_after, std::exp(3.5) * std::sqrt(14.82 / 12), 1e-9);
  EXPECT_NEAR(errors->perplexity_ratio, std::exp(0.5) * std::sqrt(0.02 / 12), 1e-9);
  EXPECT_FALSE(errors->kl_divergence.has_value());
  report.window_divergences = {0.1, 0.2, 0.2, 0.3};
  errors = StandardErrors(report);
  EXPECT_NEAR(errors->kl_divergence.value(), std::sqrt(0.02 / 12), 1e-12);
}

TEST(StandardErrorsTest, OneWindowHasNoSpread) {
  JobReport report = Report();
  report.window_losses_before = {1};
  report.window_losses_after = {1.5};
  EXPECT_FALSE(StandardErrors(report).has_value());
  EXPECT_FALSE(StandardErrors(JobReport()).has_value());
}

}  // namespace
}  // namespace walsh::pipeline
