#include "server/jobs/refusals.h"

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
  google::rpc::ErrorInfo info;
  const google::rpc::Status proto = ToProtoStatus(all);
  ASSERT_EQ(proto.details_size(), 1);
  ASSERT_TRUE(proto.details(0).UnpackTo(&info));
  EXPECT_EQ(info.reason(), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(info.metadata().at("needed"), "100");
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
