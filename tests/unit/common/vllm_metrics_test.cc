#include "common/vllm_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <string>

#include "common/metrics.h"

namespace walsh::metrics {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class VllmMetricsTest : public ::testing::Test {
 protected:
  prometheus::Family<prometheus::Counter>& CounterFamily(const std::string& name) {
    return prometheus::BuildCounter().Name(name).Help("Things.").Register(registry_);
  }
  std::string Aliases() {
    return prometheus::TextSerializer().Serialize(VllmAliases(registry_.Collect()));
  }

  prometheus::Registry registry_;
};

TEST_F(VllmMetricsTest, SeriesHaveVllmsNamesAndLabels) {
  prometheus::BuildGauge()
      .Name("walsh_num_requests_waiting")
      .Help("Accepted requests that wait.")
      .Register(registry_)
      .Add({{"model_name", "m"}})
      .Set(3);
  EXPECT_EQ(Aliases(),
            "# HELP vllm:num_requests_waiting Accepted requests that wait.\n"
            "# TYPE vllm:num_requests_waiting gauge\n"
            "vllm:num_requests_waiting{model_name=\"m\",engine=\"0\"} 3\n");
}

TEST_F(VllmMetricsTest, HistogramsKeepTheirBuckets) {
  prometheus::BuildHistogram()
      .Name("walsh_time_to_first_token_seconds")
      .Help("Time.")
      .Register(registry_)
      .Add({{"model_name", "m"}}, Buckets{0.1, 1})
      .Observe(0.5);
  const std::string text = Aliases();
  EXPECT_THAT(text, HasSubstr("vllm:time_to_first_token_seconds_bucket{model_name=\"m\","
                              "engine=\"0\",le=\"1\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("vllm:time_to_first_token_seconds_sum{model_name=\"m\","
                              "engine=\"0\"} 0.5\n"));
}

TEST_F(VllmMetricsTest, ReasonsThatVllmDoesNotTellApartAreSummed) {
  auto& family = CounterFamily("walsh_request_success_total");
  const auto count = [&](const char* reason, double n) {
    family.Add({{"model_name", "m"}, {"finished_reason", reason}}).Increment(n);
  };
  count("stop", 1);
  count("eos", 10);
  count("stop_sequence", 100);
  count("length", 1000);
  count("deadline", 10000);
  const std::string text = Aliases();
  const auto series = [](const char* reason, int n) {
    return std::string("vllm:request_success_total{finished_reason=\"") + reason +
           "\",model_name=\"m\",engine=\"0\"} " + std::to_string(n) + "\n";
  };
  EXPECT_THAT(text, HasSubstr(series("stop", 111)));
  EXPECT_THAT(text, HasSubstr(series("length", 1000)));
  EXPECT_THAT(text, HasSubstr(series("abort", 10000)));
  EXPECT_THAT(text, Not(HasSubstr("eos")));
}

TEST_F(VllmMetricsTest, OneOfOursMayBeTwoOfVllms) {
  CounterFamily("walsh_prompt_tokens_total").Add({{"model_name", "m"}}).Increment(7);
  EXPECT_THAT(Aliases(), HasSubstr("vllm:prompt_tokens_total{model_name=\"m\",engine=\"0\"} 7\n"));
  EXPECT_THAT(Aliases(),
              HasSubstr("vllm:prefix_cache_queries_total{model_name=\"m\",engine=\"0\"} 7\n"));
}

TEST_F(VllmMetricsTest, TheCacheIsDescribedAsGatewaysReadIt) {
  prometheus::BuildGauge()
      .Name("walsh_kv_cache_config_info")
      .Help("Cache.")
      .Register(registry_)
      .Add({{"block_size", "16"}, {"num_blocks", "128"}, {"prefix_cache", "true"}})
      .Set(1);
  EXPECT_THAT(Aliases(),
              HasSubstr("vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"128\","
                        "enable_prefix_caching=\"true\",engine=\"0\"} 1\n"));
}

TEST_F(VllmMetricsTest, WhatVllmDoesNotKnowHasNoAlias) {
  CounterFamily("walsh_admission_refusals_of_some_other_kind_total").Add({}).Increment();
  EXPECT_EQ(Aliases(), "");
}

}  // namespace
}  // namespace walsh::metrics
