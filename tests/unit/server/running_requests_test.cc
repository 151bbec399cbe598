#include "server/access/running_requests.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace walsh::access {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

Caller Of(const std::string& tenant, std::optional<int> n_max) {
  return {.tenant = tenant, .limits = {.running_requests = n_max}};
}

TEST(RunningRequestsTest, ATenantHasItsLimitAndLeavesOthersAlone) {
  RunningRequests running;
  const Caller a = Of("a", 2);
  EXPECT_OK(running.Begin(a, {}));
  EXPECT_OK(running.Begin(a, {}));
  const absl::Status full = running.Begin(a, {});
  EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted,
                             AllOf(HasSubstr("2 requests running"), HasSubstr("at most 2"))));
  EXPECT_EQ(ErrorReason(full), "TENANT_LIMIT");
  EXPECT_OK(running.Begin(Of("b", 1), {}));
  running.End(a, {});
  EXPECT_OK(running.Begin(a, {}));
}

TEST(RunningRequestsTest, NoLimitAndNone) {
  RunningRequests running;
  for (int i = 0; i < 1000; ++i) {
    EXPECT_OK(running.Begin(Of("a", std::nullopt), {}));
    EXPECT_OK(running.Begin(Caller(), {}));
  }
  EXPECT_THAT(running.Begin(Of("b", 0), {}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("at most 0")));
}

TEST(RunningRequestsTest, SizesOfRequestsAreSummed) {
  RunningRequests running;
  const Caller a = {.tenant = "a",
                    .limits = {.running_prompt_bytes = 1000, .running_new_tokens = 300}};
  const RequestSize size = {.prompt_bytes = 400, .new_tokens = 100};
  EXPECT_OK(running.Begin(a, size));
  EXPECT_OK(running.Begin(a, size));
  const absl::Status bytes = running.Begin(a, size);
  EXPECT_THAT(bytes, StatusIs(absl::StatusCode::kResourceExhausted,
                              AllOf(HasSubstr("800 bytes of prompts running and asks for 400 more"),
                                    HasSubstr("at most 1000"))));
  EXPECT_EQ(ErrorReason(bytes), "TENANT_LIMIT");
  EXPECT_THAT(running.Begin(a, {.prompt_bytes = 200, .new_tokens = 101}),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("200 new tokens running and asks for 101 more"),
                             HasSubstr("at most 300"))));
  EXPECT_OK(running.Begin(a, {.prompt_bytes = 200, .new_tokens = 100})) << "exactly the rest";
  running.End(a, size);
  EXPECT_OK(running.Begin(a, size)) << "what was refused took nothing";
  EXPECT_OK(running.Begin({.tenant = "b", .limits = a.limits}, size)) << "another's is its own";
}

bool HasRetryDelay(const absl::Status& status) {
  return status.GetPayload("type.googleapis.com/google.rpc.RetryInfo").has_value();
}

TEST(RunningRequestsTest, OneThatWouldNotFitAloneIsNotToComeAgain) {
  RunningRequests running;
  const Caller a = {.tenant = "a", .limits = {.running_prompt_bytes = 10}};
  EXPECT_FALSE(HasRetryDelay(running.Begin(a, {.prompt_bytes = 11})));
  EXPECT_OK(running.Begin(a, {.prompt_bytes = 1}));
  EXPECT_TRUE(HasRetryDelay(running.Begin(a, {.prompt_bytes = 10})));
}

// Row F5 of the fault matrix.
TEST(RunningRequestsTest, AHundredAtOnceNeverExceedIt) {
  RunningRequests running;
  const Caller caller = Of("a", 7);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> n_begun = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 100; ++i) {
      threads.emplace_back([&] { n_begun += running.Begin(caller, {}).ok() ? 1 : 0; });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(n_begun, 7);
    for (int i = 0; i < 7; ++i) running.End(caller, {});
  }
}

}  // namespace
}  // namespace walsh::access
