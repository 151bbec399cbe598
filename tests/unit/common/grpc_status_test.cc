#include "common/grpc_status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/cord.h"
#include "common/limits.h"
#include "common/out_of_memory.h"
#include "common/utf8.h"
#include "google/rpc/error_details.pb.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::walsh::testing::StatusIs;

template <typename Detail>
Detail DetailOf(const absl::Status& status) {
  Detail detail;
  const auto payload = status.GetPayload("type.googleapis.com/" + detail.GetTypeName());
  EXPECT_TRUE(payload.has_value() && detail.ParseFromString(std::string(*payload)));
  return detail;
}

TEST(GrpcStatusTest, EveryCodeRoundTrips) {
  for (int code = 0; code <= 16; ++code) {
    absl::Status status(static_cast<absl::StatusCode>(code), "message é");
    SetErrorInfo(status, "WHY", {{"limit", "4"}});
    SetRetryDelay(status, absl::Milliseconds(1500));
    const grpc::Status wire = ToGrpcStatus(status);
    EXPECT_EQ(static_cast<int>(wire.error_code()), code);
    EXPECT_EQ(FromGrpcStatus(wire), status);
    EXPECT_EQ(FromProtoStatus(ToProtoStatus(status)), status);
    if (code != 0) {
      EXPECT_EQ(ErrorReason(FromGrpcStatus(wire)), "WHY");
    }
  }
}

TEST(GrpcStatusTest, DetailsAreTheStandardOnes) {
  absl::Status full = absl::ResourceExhaustedError("queue full");
  SetErrorInfo(full, "QUEUE_FULL", {{"limit", "10"}});
  SetRetryDelay(full, absl::Milliseconds(2500));
  google::rpc::Status wire;
  ASSERT_TRUE(wire.ParseFromString(ToGrpcStatus(full).error_details()));
  EXPECT_EQ(wire.code(), 8);
  EXPECT_EQ(wire.message(), "queue full");
  ASSERT_EQ(wire.details_size(), 2);
  const auto info = DetailOf<google::rpc::ErrorInfo>(full);
  EXPECT_EQ(info.domain(), "walsh.v1");
  EXPECT_EQ(info.metadata().at("limit"), "10");
  const auto retry = DetailOf<google::rpc::RetryInfo>(full);
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);

  const absl::Status field = InvalidField("options.bits", "must be 2, 3, 4 or 8, is 5");
  EXPECT_THAT(field, StatusIs(absl::StatusCode::kInvalidArgument,
                              "options.bits: must be 2, 3, 4 or 8, is 5"));
  EXPECT_EQ(DetailOf<google::rpc::BadRequest>(field).field_violations(0).field(), "options.bits");

  const absl::Status missing = NotFound("model", "x");
  EXPECT_THAT(missing, StatusIs(absl::StatusCode::kNotFound, "model 'x' does not exist"));
  EXPECT_EQ(DetailOf<google::rpc::ResourceInfo>(missing).resource_name(), "x");

  absl::Status taken = absl::AlreadyExistsError("taken");
  SetResourceInfo(taken, "job", "jobs/a", "by \xff another");
  EXPECT_EQ(DetailOf<google::rpc::ResourceInfo>(taken).resource_type(), "job");
  EXPECT_EQ(DetailOf<google::rpc::ResourceInfo>(taken).description(), "by \uFFFD another");

  absl::Status state = absl::FailedPreconditionError("wrong state");
  SetPreconditionFailure(state, "JOB_STATE", "jobs/a", "is SUCCEEDED");
  const auto failure = DetailOf<google::rpc::PreconditionFailure>(state);
  EXPECT_EQ(failure.violations(0).type(), "JOB_STATE");
  EXPECT_EQ(failure.violations(0).subject(), "jobs/a");

  SetQuotaFailure(full, "queued jobs", "at most 10");
  EXPECT_EQ(DetailOf<google::rpc::QuotaFailure>(full).violations(0).description(), "at most 10");
}

TEST(GrpcStatusTest, AStatusWithoutDetailsSendsNone) {
  EXPECT_THAT(ToGrpcStatus(absl::InternalError("x")).error_details(), IsEmpty());
  EXPECT_THAT(ErrorReason(absl::InternalError("x")), IsEmpty());
  absl::Status ok;
  SetErrorInfo(ok, "NOTHING");
  EXPECT_TRUE(ToGrpcStatus(ok).ok());
}

TEST(GrpcStatusTest, MessagesAreCutAtACharacterAndValid) {
  std::string text(limits::kStatusMessageBytesMax - 1, 'x');
  text += "é and more";
  const grpc::Status cut = ToGrpcStatus(absl::InternalError(text));
  EXPECT_THAT(cut.error_message(), SizeIs(limits::kStatusMessageBytesMax - 1));
  EXPECT_TRUE(IsValidUtf8(ToGrpcStatus(absl::InternalError("a\xFF")).error_message()));
  EXPECT_TRUE(IsValidUtf8(InvalidField("f\xFF", "d\xFF").message().data()));
  // A name that a client sent does not fill the message.
  EXPECT_LT(NotFound("model", std::string(1 << 20, 'm')).message().size(), 400u);
}

// 8 KiB of metadata hold the details in base64 and the percent-encoded message.
TEST(GrpcStatusTest, DetailsThatDoNotFitAreDroppedLargestFirst) {
  absl::Status status = absl::InvalidArgumentError(std::string(5000, 'x'));
  SetErrorInfo(status, "SMALL");
  status.SetPayload("type.googleapis.com/large", absl::Cord(std::string(10'000, 'y')));
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_LE(wire.error_details().size(), static_cast<size_t>(limits::kStatusDetailsBytesMax));
  EXPECT_EQ(ErrorReason(FromGrpcStatus(wire)), "SMALL");
}

TEST(GrpcStatusTest, MarksOfAProcessStayInIt) {
  absl::Status status = OutOfMemoryError("no memory left");
  EXPECT_TRUE(IsOutOfMemory(status));
  EXPECT_FALSE(IsOutOfMemory(absl::ResourceExhaustedError("too many open files")));
  SetErrorInfo(status, "SMALL");
  EXPECT_EQ(ToProtoStatus(status).details_size(), 1);
  const absl::Status arrived = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_FALSE(IsOutOfMemory(arrived));
  EXPECT_EQ(ErrorReason(arrived), "SMALL");
}

TEST(GrpcStatusTest, WhatAPeerSendsIsNotTrusted) {
  EXPECT_THAT(FromGrpcStatus(grpc::Status(grpc::StatusCode::NOT_FOUND, "m", "not a message")),
              StatusIs(absl::StatusCode::kNotFound, "m"));
  google::rpc::Status other = ToProtoStatus(absl::OkStatus());
  EXPECT_THAT(
      FromGrpcStatus(grpc::Status(grpc::StatusCode::INTERNAL, "m", other.SerializeAsString())),
      StatusIs(absl::StatusCode::kInternal, "m"));
  EXPECT_EQ(FromGrpcStatus(grpc::Status(grpc::StatusCode::DO_NOT_USE, "m")).code(),
            absl::StatusCode::kUnknown);
  google::rpc::Status unknown;
  unknown.set_code(-3);
  EXPECT_EQ(FromProtoStatus(unknown).code(), absl::StatusCode::kUnknown);
  absl::Status broken = absl::InternalError("m");
  broken.SetPayload("type.googleapis.com/google.rpc.ErrorInfo", absl::Cord("\xFF\xFF"));
  EXPECT_THAT(ErrorReason(broken), IsEmpty());
}

TEST(GrpcStatusTest, RetryDelaysAreClamped) {
  absl::Status status = absl::UnavailableError("x");
  SetRetryDelay(status, -absl::Seconds(1));
  EXPECT_EQ(DetailOf<google::rpc::RetryInfo>(status).retry_delay().seconds(), 0);
  SetRetryDelay(status, absl::InfiniteDuration());
  EXPECT_EQ(DetailOf<google::rpc::RetryInfo>(status).retry_delay().seconds(), 86'400);
}

}  // namespace
}  // namespace walsh
