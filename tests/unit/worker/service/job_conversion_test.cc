#include "worker/service/job_conversion.h"

#include <gtest/gtest.h>

namespace walsh::service {
namespace {

TEST(ToResultTest, WhatWasNotMeasuredIsAbsent) {
  pipeline::JobReport report;
  v1::QuantizationJob::Result result = ToResult(report, "m");
  EXPECT_FALSE(result.has_kl_divergence());
  EXPECT_FALSE(result.has_top1_agreement());
  EXPECT_EQ(result.peak_device_memory_bytes(), 0);
  report.kl_divergence = 0;
  report.top1_agreement = 0.75;
  report.peak_device_memory_bytes = 123;
  result = ToResult(report, "m");
  EXPECT_TRUE(result.has_kl_divergence());
  EXPECT_EQ(result.kl_divergence(), 0);
  EXPECT_EQ(result.top1_agreement(), 0.75);
  EXPECT_EQ(result.peak_device_memory_bytes(), 123);
}

TEST(ToResultTest, StepsComeInTheirOrder) {
  pipeline::JobReport report;
  EXPECT_EQ(ToResult(report, "m").step_times_size(), 0);
  report.steps = {{"hessian", 1.5}, {"columns", 0.25}};
  const v1::QuantizationJob::Result result = ToResult(report, "m");
  ASSERT_EQ(result.step_times_size(), 2);
  EXPECT_EQ(result.step_times(0).name(), "hessian");
  EXPECT_EQ(result.step_times(0).seconds(), 1.5);
  EXPECT_EQ(result.step_times(1).name(), "columns");
  EXPECT_EQ(result.step_times(1).seconds(), 0.25);
}

}  // namespace
}  // namespace walsh::service
