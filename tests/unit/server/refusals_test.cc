#include "server/jobs/refusals.h"

#include <optional>
#include <string>
#include <utility>

#include "common/grpc_status.h"
#include "common/limits.h"
#include "google/rpc/error_details.pb.h"
#include "tests/testing/status_matchers.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::StatusIs;

absl::Status WithReason(absl::StatusCode code, const std::string& message,
                        const std::string& reason) {
  absl::Status status(code, message);
  SetErrorInfo(status, reason, {{"needed", "100"}});
  return status;
}

absl::Status TooLittleMemory(int has) {
  return WithReason(absl::StatusCode::kFailedPrecondition,
                    "the job needs 100 bytes of memory, the worker has " + std::to_string(has),
                    "INSUFFICIENT_MEMORY");
}

// The detail of this type, where the status has one.
template <typename T>
std::optional<T> Detail(const absl::Status& status) {
  const google::rpc::Status proto = ToProtoStatus(status);
  T detail;
  for (const google::protobuf::Any& any : proto.details()) {
    if (any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

TEST(RefusalsTest, WhatIsAboutTheWorkerAndWhatAboutTheJob) {
  EXPECT_TRUE(IsRefusal(TooLittleMemory(80)));
  EXPECT_TRUE(IsRefusal(absl::UnimplementedError("head_dim 80")));
  EXPECT_TRUE(
      IsRefusal(WithReason(absl::StatusCode::kResourceExhausted, "the disk", "INSUFFICIENT_DISK")));
  EXPECT_TRUE(IsRefusal(WithReason(absl::StatusCode::kUnavailable, "cuda:0", "DEVICE_BROKEN")));
  EXPECT_FALSE(IsRefusal(absl::OkStatus()));
  for (int code = 1; code <= 16; ++code) {
    const auto status = static_cast<absl::StatusCode>(code);
    EXPECT_EQ(IsRefusal(absl::Status(status, "x")), absl::StatusCode::kUnimplemented == status);
  }
}

TEST(RefusalsTest, ASingleRefusalKeepsItsDetails) {
  const absl::Status all = RefusedByAll({{"workers/a", TooLittleMemory(80)}});
  EXPECT_THAT(all, StatusIs(absl::StatusCode::kFailedPrecondition,
                            "no worker can run the job: workers/a: the job needs 100 bytes of "
                            "memory, the worker has 80"));
  const auto info = Detail<google::rpc::ErrorInfo>(all);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(info->metadata().at("needed"), "100");
}

TEST(RefusalsTest, DetailsTellWhetherAnotherTryIsWorthIt) {
  const absl::Status never =
      RefusedByAll({{"workers/a", TooLittleMemory(80)}, {"workers/b", TooLittleMemory(90)}});
  const auto precondition = Detail<google::rpc::PreconditionFailure>(never);
  ASSERT_TRUE(precondition.has_value());
  ASSERT_EQ(precondition->violations_size(), 1);
  EXPECT_EQ(precondition->violations(0).type(), "INSUFFICIENT_MEMORY");
  EXPECT_FALSE(Detail<google::rpc::RetryInfo>(never).has_value());
  for (const auto& [code, reason] :
       {std::pair(absl::StatusCode::kUnavailable, "DEVICE_BROKEN"),
        std::pair(absl::StatusCode::kResourceExhausted, "INSUFFICIENT_DISK")}) {
    const absl::Status later = RefusedByAll({{"workers/a", WithReason(code, "x", reason)}});
    const auto retry = Detail<google::rpc::RetryInfo>(later);
    ASSERT_TRUE(retry.has_value()) << reason;
    EXPECT_GT(retry->retry_delay().seconds(), 0);
    EXPECT_FALSE(Detail<google::rpc::PreconditionFailure>(later).has_value());
  }
}

TEST(RefusalsTest, WorkersThatSayTheSameAreNamedTogether) {
  const absl::Status all = RefusedByAll({{"workers/a", TooLittleMemory(80)},
                                         {"workers/b", TooLittleMemory(90)},
                                         {"workers/c", TooLittleMemory(80)}});
  EXPECT_THAT(all, StatusIs(absl::StatusCode::kFailedPrecondition,
                            HasSubstr("workers/a, workers/c: the job needs 100 bytes of memory, "
                                      "the worker has 80; workers/b: the job needs 100 bytes of "
                                      "memory, the worker has 90")));
  EXPECT_EQ(ErrorReason(all), "INSUFFICIENT_MEMORY");
}

TEST(RefusalsTest, DifferentCodesAndReasonsHaveNoneInCommon) {
  absl::Status all = RefusedByAll(
      {{"workers/a", absl::UnimplementedError("head_dim 80")}, {"workers/b", TooLittleMemory(80)}});
  EXPECT_THAT(all, StatusIs(absl::StatusCode::kFailedPrecondition,
                            HasSubstr("workers/a: head_dim 80; workers/b: ")));
  EXPECT_EQ(ErrorReason(all), "NO_SUITABLE_WORKER");
  // Worth another try: the device of b may be back.
  all = RefusedByAll(
      {{"workers/a", TooLittleMemory(80)},
       {"workers/b", WithReason(absl::StatusCode::kUnavailable, "broken", "DEVICE_BROKEN")}});
  EXPECT_THAT(all, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("broken")));
  EXPECT_EQ(ErrorReason(all), "NO_SUITABLE_WORKER");
  all = RefusedByAll({{"workers/a", absl::UnimplementedError("head_dim 80")}});
  EXPECT_THAT(all, StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 80")));
  EXPECT_EQ(ErrorReason(all), "NO_SUITABLE_WORKER") << "the worker gave none";
}

TEST(RefusalsTest, ALargeFleetDoesNotPushTheReasonsOut) {
  Refusals refusals;
  for (int i = 100; i < 200; ++i) {
    refusals["workers/w-" + std::to_string(i)] =
        i % 2 == 0 ? TooLittleMemory(80) : absl::UnimplementedError("head_dim 80");
  }
  const absl::Status all = RefusedByAll(refusals);
  EXPECT_LT(all.message().size(), size_t{limits::kStatusMessageBytesMax});
  EXPECT_THAT(std::string(all.message()), HasSubstr("workers/w-106 and 46 more: the job needs"));
  EXPECT_THAT(std::string(all.message()), HasSubstr("workers/w-107 and 46 more: head_dim 80"));
  EXPECT_THAT(std::string(all.message()), Not(HasSubstr("w-108")));
}

}  // namespace
}  // namespace walsh::jobs
