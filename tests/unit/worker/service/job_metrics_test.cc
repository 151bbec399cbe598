#include "worker/service/job_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/testing/metric_value.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;

double NumErrors(const std::string& kind) {
  return testing::MetricValue("walsh_quantization_layer_error_count",
                              {absl::StrCat("linear=\"", kind, "\"")});
}

pipeline::JobProgress Linear(const std::string& name, int64_t layer) {
  pipeline::JobProgress progress;
  progress.linears.push_back({.name = name, .layer = layer, .bits = 4, .relative_error = 0.01});
  return progress;
}

// increase() of a counter that appears with its first event is 0.
TEST(JobMetricsTest, SeriesAreThereBeforeTheirFirstEvent) {
  RegisterJobMetrics();
  for (const char* series :
       {"walsh_quantization_layer_seconds_count ",
        "walsh_quantization_fallbacks_total{reason=\"factorization\"} ",
        "walsh_quantization_damp_retries_total ", "walsh_quantization_calibration_tokens_total ",
        "walsh_quantization_yield_seconds_total ", "walsh_artifact_bytes_total{op=\"write\"} ",
        "walsh_artifact_errors_total{op=\"write\"} "}) {
    EXPECT_THAT(metrics::Render(), HasSubstr(absl::StrCat("\n", series)));
  }
}

// Layers of one kind share a series, and a model of many kinds does not make many.
TEST(JobProgressMetricsTest, ErrorsAreByKindOfLinear) {
  JobProgressMetrics metrics;
  metrics.Observe(Linear("layers.0.mlp.down_proj", 0), absl::ZeroDuration());
  metrics.Observe(Linear("layers.11.mlp.down_proj", 11), absl::ZeroDuration());
  metrics.Observe(Linear("layers.1.self_attn.q_proj", 1), absl::ZeroDuration());
  EXPECT_EQ(NumErrors("mlp.down_proj"), 2);
  EXPECT_EQ(NumErrors("self_attn.q_proj"), 1);
  const double others = NumErrors("other");
  for (int i = 0; i < 40; ++i) {
    metrics.Observe(Linear(absl::StrCat("layers.0.experts.", i), 0), absl::ZeroDuration());
  }
  EXPECT_EQ(NumErrors("other") - others, 40 - 14);
  metrics.Observe(Linear("layers.2.mlp.down_proj", 2), absl::ZeroDuration());
  EXPECT_EQ(NumErrors("mlp.down_proj"), 3) << "a known kind keeps its series";
}

}  // namespace
}  // namespace walsh::service
