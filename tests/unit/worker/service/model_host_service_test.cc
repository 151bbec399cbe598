#include "worker/service/model_host_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "worker/kernels/device_failure.h"

namespace walsh::service {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::StatusIs;
using Response = internal::v1::ValidateJobResponse;

class ValidateJobTest : public StoreFixture {
 protected:
  void SetUp() override {
    OpenStore();
    plan_->memory_bytes_needed = 1000;
    plan_->device_memory_bytes_needed = 500;
    memory_->host = {.total_bytes = 2000, .free_bytes = 1500};
    memory_->device = {.total_bytes = 800, .free_bytes = 700};
    memory_->device_name = "cuda:0 NVIDIA H200";
  }

  absl::StatusOr<Response> Validate() {
    ModelHostService service(
        {.data_dir = dir_.path(),
         .device = "cuda:0 NVIDIA H200",
         .resolve = [](std::string_view path) { return std::string(path); },
         .plan = [this](const pipeline::JobSpec&) { return plan_; },
         .memory = [this] { return memory_; },
         .on_device_broken = [this](const absl::Status& cause) { broken_ = cause; }},
        store_.get(), /*conversions=*/nullptr);
    internal::v1::ValidateJobRequest request;
    request.mutable_job()->set_model_name("m");
    request.mutable_job()->set_source_model("source");
    Response response;
    const grpc::Status status = service.ValidateJob(nullptr, &request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  absl::StatusOr<pipeline::JobPlan> plan_ = pipeline::JobPlan();
  absl::StatusOr<WorkerMemory> memory_ = WorkerMemory();
  absl::Status broken_;
};

TEST_F(ValidateJobTest, TellsWhatTheJobNeedsAndTheWorkerHas) {
  plan_->disk_bytes_needed = 10;
  ASSERT_OK_AND_ASSIGN(const Response response, Validate());
  EXPECT_EQ(response.memory_bytes_needed(), 1000);
  EXPECT_EQ(response.memory_bytes_free(), 1500);
  EXPECT_EQ(response.device_memory_bytes_needed(), 500);
  EXPECT_EQ(response.device_memory_bytes_free(), 700);
  EXPECT_EQ(response.memory_bytes_total(), 2000);
  EXPECT_EQ(response.device_memory_bytes_total(), 800);
  EXPECT_EQ(response.disk_bytes_needed(), 10);
  EXPECT_GT(response.disk_bytes_free(), 10);
  EXPECT_EQ(response.device(), "cuda:0 NVIDIA H200");
  EXPECT_THAT(response.warnings(), IsEmpty());
}

TEST_F(ValidateJobTest, WhatFindsNoRoomOnTheDiskIsRefused) {
  plan_->disk_bytes_needed = int64_t{1} << 60;
  const absl::Status refused = Validate().status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                HasSubstr("the artifact needs 1152921504606846976 bytes of disk")));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_DISK");
}

TEST_F(ValidateJobTest, WhatFitsOnceMemoryIsFreeIsWarnedOf) {
  memory_->host.free_bytes = 999;
  memory_->device.free_bytes = 499;
  ASSERT_OK_AND_ASSIGN(const Response response, Validate());
  EXPECT_THAT(response.warnings(),
              ElementsAre("the job needs 1000 bytes of memory, of which 999 are free now",
                          "the job needs 500 bytes of memory on cuda:0 NVIDIA H200, of which 499 "
                          "are free now"));
}

TEST_F(ValidateJobTest, WhatNeverFitsIsRefused) {
  memory_->device.total_bytes = 499;
  absl::Status refused = Validate().status();
  EXPECT_THAT(refused,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("needs 500 bytes of device memory, cuda:0 NVIDIA H200 has 499")));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_MEMORY");
  memory_->host.total_bytes = 999;
  refused = Validate().status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition,
                                HasSubstr("needs 1000 bytes of memory, the worker has 999")));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_MEMORY");
}

TEST_F(ValidateJobTest, OnTheCpuThereIsNoOtherMemory) {
  plan_->device_memory_bytes_needed = 0;
  memory_->device = {};
  ASSERT_OK_AND_ASSIGN(const Response response, Validate());
  EXPECT_EQ(response.device_memory_bytes_free(), 0);
  EXPECT_THAT(response.warnings(), IsEmpty());
}

TEST_F(ValidateJobTest, ABrokenDeviceIsToldToTheWorkerAndRetriedByOthers) {
  memory_ = MarkDeviceBroken(absl::InternalError("fell off the bus"));
  const absl::Status refused = Validate().status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("fell off the bus")));
  EXPECT_EQ(ErrorReason(refused), "DEVICE_BROKEN");
  EXPECT_TRUE(IsDeviceBroken(broken_));
}

}  // namespace
}  // namespace walsh::service
