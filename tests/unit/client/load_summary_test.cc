#include "client/load_summary.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

RequestRecord Done(int due_ms, int first_ms, int last_ms, int n_tokens) {
  RequestRecord record{.due = absl::Milliseconds(due_ms),
                       .first_token = absl::Milliseconds(first_ms),
                       .last_token = absl::Milliseconds(last_ms),
                       .end = absl::Milliseconds(last_ms + 1),
                       .n_prompt_tokens = 10,
                       .n_output_tokens = n_tokens};
  for (int i = 1; i < n_tokens; ++i) {
    record.token_gaps.push_back({.seconds = 0.001f * static_cast<float>(last_ms - first_ms) /
                                            static_cast<float>(n_tokens - 1),
                                 .n_tokens = 1});
  }
  return record;
}

TEST(DistributionTest, PercentilesAreInterpolated) {
  const Distribution times = DistributionOf({{4}, {1}, {3}, {2}, {5}});
  EXPECT_DOUBLE_EQ(times.mean, 3);
  EXPECT_DOUBLE_EQ(times.p50, 3);
  EXPECT_DOUBLE_EQ(times.p90, 4.6);
  EXPECT_DOUBLE_EQ(times.p99, 4.96);
  EXPECT_DOUBLE_EQ(times.max, 5);
  EXPECT_DOUBLE_EQ(DistributionOf({{7}}).p99, 7);
  EXPECT_DOUBLE_EQ(DistributionOf({}).max, 0);
}

// As if each stood there as often as it counts: 1 1 1 2 2 6.
TEST(DistributionTest, AValueStandsForItsEquals) {
  const Distribution times = DistributionOf({{2, 2}, {6, 1}, {1, 3}});
  EXPECT_DOUBLE_EQ(times.mean, 13.0 / 6);
  EXPECT_DOUBLE_EQ(times.p50, 1.5);
  EXPECT_DOUBLE_EQ(times.p90, 4.0);
  EXPECT_DOUBLE_EQ(times.max, 6);
}

TEST(LoadSummaryTest, TimesCountFromWhenARequestWasDue) {
  LoadResult result{.elapsed = absl::Seconds(2), .concurrency_peak = 2};
  result.requests = {Done(100, 150, 250, 11), Done(200, 300, 300, 1)};
  const LoadSummary summary = Summarize(result);
  EXPECT_EQ(summary.n_done, 2);
  EXPECT_EQ(summary.n_prompt_tokens, 20);
  EXPECT_EQ(summary.n_output_tokens, 12);
  EXPECT_DOUBLE_EQ(summary.PerSecond(summary.n_output_tokens), 6);
  EXPECT_DOUBLE_EQ(summary.time_to_first_token.mean, 0.075);
  EXPECT_DOUBLE_EQ(summary.time_to_first_token.max, 0.1);
  EXPECT_NEAR(summary.inter_token_latency.p50, 0.01, 1e-8);
  // Of the one that has two tokens or more.
  EXPECT_DOUBLE_EQ(summary.time_per_output_token.mean, 0.01);
  EXPECT_DOUBLE_EQ(summary.request_latency.max, 0.151);
}

TEST(LoadSummaryTest, FailuresAreCountedByTheirCodeAndTheirTimesAreNot) {
  LoadResult result{.elapsed = absl::Seconds(1)};
  result.requests = {Done(0, 10, 20, 2), Done(0, 10, 500, 2), Done(0, 10, 500, 2),
                     Done(0, 10, 500, 2)};
  result.requests[1].status = absl::ResourceExhaustedError("64 requests wait");
  result.requests[2].status = absl::ResourceExhaustedError("65 requests wait");
  result.requests[3].status = absl::UnavailableError("gone");
  const LoadSummary summary = Summarize(result);
  EXPECT_EQ(summary.n_done, 1);
  EXPECT_EQ(summary.n_failed(), 3);
  EXPECT_EQ(summary.failures.at(absl::StatusCode::kResourceExhausted).count, 2);
  EXPECT_EQ(summary.failures.at(absl::StatusCode::kResourceExhausted).example, "64 requests wait");
  EXPECT_EQ(summary.n_output_tokens, 2);
  EXPECT_DOUBLE_EQ(summary.request_latency.max, 0.021);
}

TEST(LoadSummaryTest, WhatWasStoppedIsNoFailure) {
  LoadResult result{.is_stopped = true};
  result.requests = {Done(0, 10, 20, 2), Done(0, 10, 20, 2)};
  result.requests[1].status = absl::CancelledError("stopped");
  EXPECT_EQ(Summarize(result).n_failed(), 0);
  result.is_stopped = false;
  EXPECT_EQ(Summarize(result).n_failed(), 1);
}

}  // namespace
}  // namespace walsh::client
