#include "client/terminal/load_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace walsh::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

LoadSummary Summary() {
  LoadSummary summary{.n_done = 64, .seconds = 8, .concurrency_peak = 4};
  summary.n_prompt_tokens = 32768;
  summary.n_output_tokens = 16384;
  summary.time_to_first_token = {.mean = 0.05, .p50 = 0.04, .p90 = 0.07, .p99 = 0.09, .max = 0.1};
  return summary;
}

TEST(LoadReportTest, HasTheLoadTheRatesAndTheTimes) {
  const std::string text = LoadReport({.model = "m", .concurrency = 4}, Summary());
  EXPECT_THAT(text, HasSubstr("model 'm', closed loop, 4 streams\n"));
  EXPECT_THAT(text, HasSubstr("64 done, 0 failed in 8.00 s; 8.000 requests a second"));
  EXPECT_THAT(text, HasSubstr("16,384 tokens, 2048 tokens a second"));
  EXPECT_THAT(text, HasSubstr("time to first token    50.00  40.00  70.00  90.00  100.0"));
  EXPECT_THAT(text, Not(HasSubstr("failures")));
}

TEST(LoadReportTest, FailuresAreToldAndWhatTheyQuoteIsHarmless) {
  LoadSummary summary = Summary();
  summary.is_stopped = true;
  summary.n_unsent = 12;
  summary.failures[absl::StatusCode::kResourceExhausted] = {.count = 3, .example = "full\x1b[2J"};
  const std::string text = LoadReport({.model = "m", .concurrency = 9, .rate = 2.5}, summary);
  EXPECT_THAT(text, HasSubstr("Poisson arrivals, 2.500 requests a second, at most 9 at once; "
                              "stopped early"));
  EXPECT_THAT(text, HasSubstr("12 more were due and not sent"));
  EXPECT_THAT(text, HasSubstr("RESOURCE_EXHAUSTED, 3 times: full"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
}

TEST(LoadReportTest, JsonHasSecondsAndEveryFailure) {
  LoadSummary summary = Summary();
  summary.failures[absl::StatusCode::kUnavailable] = {.count = 1, .example = "bad \xff byte"};
  const auto json = nlohmann::json::parse(
      LoadJson({.model = "m", .concurrency = 4, .prompt_tokens = 512, .max_tokens = 256}, summary));
  EXPECT_EQ(json["load"], "closed");
  EXPECT_EQ(json["output_tokens_per_second"], 2048.0);
  EXPECT_EQ(json["time_to_first_token_seconds"]["p99"], 0.09);
  EXPECT_EQ(json["failures"]["UNAVAILABLE"]["count"], 1);
  EXPECT_EQ(json["prompt_tokens_each"], 512);
}

}  // namespace
}  // namespace walsh::client
