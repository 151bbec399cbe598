#include "worker/pipeline/artifact_report.h"

#include <gtest/gtest.h>

namespace walsh::pipeline {
namespace {

TEST(QualityReportTest, HasTheDivergenceWhereItWasMeasured) {
  JobReport report;
  EXPECT_FALSE(QualityReport({}, report).contains("kl_divergence"));
  EXPECT_FALSE(QualityReport({}, report).contains("top1_agreement"));
  report.kl_divergence = 0;
  report.top1_agreement = 1;
  EXPECT_EQ(QualityReport({}, report)["kl_divergence"], 0.0);
  EXPECT_EQ(QualityReport({}, report)["top1_agreement"], 1.0);
}

}  // namespace
}  // namespace walsh::pipeline
