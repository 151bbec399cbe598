#include "client/load_generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <set>
#include <thread>

#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

using ::testing::SizeIs;

TEST(LoadGeneratorTest, AClosedLoopSendsEachRequestOnceAndKeepsItsStreamsBusy) {
  std::mutex mutex;
  std::multiset<int64_t> indices;
  std::atomic<int> n_running = 0, n_running_max = 0;
  LoadGenerator generator({.concurrency = 3, .n_requests = 20}, Clock::Real());
  ASSERT_OK_AND_ASSIGN(const LoadResult result,
                       generator.Run([&](int64_t index, RequestRecorder& recorder, Cancellation&) {
                         const int running = ++n_running;
                         if (running > n_running_max) n_running_max = running;
                         {
                           const std::lock_guard lock(mutex);
                           indices.insert(index);
                         }
                         // Until all streams are busy, once.
                         EXPECT_TRUE(testing::WaitUntil([&] { return n_running_max >= 3; }));
                         recorder.SetPromptTokens(7);
                         recorder.OnTokens(2);
                         --n_running;
                         return absl::OkStatus();
                       }));
  EXPECT_THAT(indices, SizeIs(20));
  EXPECT_EQ(std::set<int64_t>(indices.begin(), indices.end()).size(), 20u);
  EXPECT_EQ(result.concurrency_peak, 3);
  EXPECT_FALSE(result.is_stopped);
  ASSERT_THAT(result.requests, SizeIs(20));
  for (const RequestRecord& request : result.requests) {
    EXPECT_EQ(request.n_prompt_tokens, 7);
    EXPECT_EQ(request.n_output_tokens, 2);
    EXPECT_GE(request.first_token, request.due);
    EXPECT_GE(request.end, request.last_token);
    EXPECT_LE(request.end, result.elapsed);
  }
}

TEST(LoadGeneratorTest, APoissonLoadIsDueAtTimesOfItsSeedWhateverTheServiceDoes) {
  const LoadOptions options{.concurrency = 4, .rate = 2000, .n_requests = 200, .seed = 3};
  const auto run = [&](absl::Duration service_time) {
    LoadGenerator generator(options, Clock::Real());
    std::vector<absl::Duration> due;
    const auto result = generator.Run([&](int64_t, RequestRecorder&, Cancellation& stop) {
      EXPECT_TRUE(stop.Sleep(service_time));
      return absl::OkStatus();
    });
    EXPECT_OK(result);
    for (const RequestRecord& request : result->requests) due.push_back(request.due);
    return due;
  };
  const std::vector<absl::Duration> due = run(absl::ZeroDuration());
  ASSERT_THAT(due, SizeIs(200));
  EXPECT_TRUE(std::is_sorted(due.begin(), due.end()));
  // The mean gap of 199 exponential ones of 0.5 ms, within five standard errors.
  EXPECT_NEAR(absl::ToDoubleMilliseconds(due.back()) / 199, 0.5, 5 * 0.5 / std::sqrt(199.0));
  EXPECT_EQ(run(absl::Milliseconds(2)), due);
}

// Five requests are due within microseconds, and the one stream takes 20 ms for each.
TEST(LoadGeneratorTest, WaitingForABusyServiceIsPartOfARequestsTime) {
  LoadGenerator generator({.concurrency = 1, .rate = 1e6, .n_requests = 5}, Clock::Real());
  ASSERT_OK_AND_ASSIGN(const LoadResult result,
                       generator.Run([&](int64_t, RequestRecorder&, Cancellation& stop) {
                         EXPECT_TRUE(stop.Sleep(absl::Milliseconds(20)));
                         return absl::OkStatus();
                       }));
  ASSERT_THAT(result.requests, SizeIs(5));
  EXPECT_GE(result.requests[4].end - result.requests[4].due, absl::Milliseconds(99));
  EXPECT_EQ(result.concurrency_peak, 1);
}

TEST(LoadGeneratorTest, NothingIsSentAfterTheDuration) {
  LoadGenerator closed(
      {.concurrency = 2, .n_requests = 1000, .duration_max = absl::Milliseconds(50)},
      Clock::Real());
  ASSERT_OK_AND_ASSIGN(const LoadResult result,
                       closed.Run([&](int64_t, RequestRecorder&, Cancellation& stop) {
                         EXPECT_TRUE(stop.Sleep(absl::Milliseconds(20)));
                         return absl::OkStatus();
                       }));
  EXPECT_EQ(result.n_unsent, 0);
  EXPECT_GE(result.requests.size(), 2u);
  EXPECT_LE(result.requests.size(), 6u);  // two streams, each at 0, 20 and 40 ms at the latest
  for (const RequestRecord& request : result.requests) {
    EXPECT_LT(request.due, absl::Milliseconds(50));
  }
}

// Some 60 are due in 60 ms, and the one stream sends at most three of them by then.
TEST(LoadGeneratorTest, WhatIsDueAndNotSentInTimeIsCounted) {
  const absl::Duration duration = absl::Milliseconds(60);
  LoadGenerator generator(
      {.concurrency = 1, .rate = 1000, .n_requests = 1000, .duration_max = duration},
      Clock::Real());
  ASSERT_OK_AND_ASSIGN(const LoadResult result,
                       generator.Run([&](int64_t, RequestRecorder&, Cancellation& stop) {
                         EXPECT_TRUE(stop.Sleep(absl::Milliseconds(25)));
                         return absl::OkStatus();
                       }));
  EXPECT_GE(result.requests.size(), 1u);
  EXPECT_LE(result.requests.size(), 3u);
  EXPECT_GT(result.n_unsent, 20);
}

TEST(LoadGeneratorTest, StopCancelsWhatRunsAndSendsNoMore) {
  LoadGenerator generator({.concurrency = 2, .n_requests = 100}, Clock::Real());
  std::atomic<int> n_sent = 0;
  std::thread stopping([&] {
    EXPECT_TRUE(testing::WaitUntil([&] { return n_sent == 2; }));
    generator.Stop();
  });
  const auto result = generator.Run([&](int64_t, RequestRecorder&, Cancellation& stop) {
    ++n_sent;
    return stop.Sleep(absl::Seconds(30)) ? absl::OkStatus() : absl::CancelledError("stopped");
  });
  stopping.join();
  ASSERT_OK(result);
  EXPECT_TRUE(result->is_stopped);
  EXPECT_EQ(n_sent, 2);
  ASSERT_THAT(result->requests, SizeIs(2));
  for (const RequestRecord& request : result->requests) {
    EXPECT_TRUE(absl::IsCancelled(request.status));
  }
}

TEST(RequestRecorderTest, TokensOfOneMessageShareItsGap) {
  ManualClock clock;
  RequestRecord record;
  RequestRecorder recorder(&clock, clock.Monotonic(), &record);
  clock.Advance(absl::Milliseconds(100));
  recorder.OnTokens(2);
  clock.Advance(absl::Milliseconds(30));
  recorder.OnTokens(3);
  recorder.OnTokens(0);
  clock.Advance(absl::Milliseconds(5));
  recorder.OnTokens(1);
  EXPECT_EQ(record.n_output_tokens, 6);
  EXPECT_EQ(record.first_token, absl::Milliseconds(100));
  EXPECT_EQ(record.last_token, absl::Milliseconds(135));
  ASSERT_THAT(record.token_gaps, SizeIs(2));
  EXPECT_FLOAT_EQ(record.token_gaps[0].seconds, 0.010f);
  EXPECT_EQ(record.token_gaps[0].n_tokens, 3);
  EXPECT_FLOAT_EQ(record.token_gaps[1].seconds, 0.005f);
  EXPECT_EQ(record.token_gaps[1].n_tokens, 1);
}

}  // namespace
}  // namespace walsh::client
