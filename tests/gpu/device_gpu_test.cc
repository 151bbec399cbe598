#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/gpu/device_memory.h"
#include "tests/testing/status_matchers.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device.h"
#include "worker/kernels/device_failure.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::AnyOf;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

// Runs on machines without a GPU too: there the answer is one of two clean errors.
TEST(DeviceTest, ListsDevicesOrSaysWhyNot) {
  const auto devices = ListDevices();
  if (!devices.ok()) {
    EXPECT_THAT(devices.status(), AnyOf(HasCode(absl::StatusCode::kFailedPrecondition),
                                        HasCode(absl::StatusCode::kNotFound)));
    EXPECT_THAT(std::string(devices.status().message()), HasSubstr("cudaGetDeviceCount"));
    return;
  }
  for (const DeviceInfo& device : *devices) {
    EXPECT_FALSE(device.name.empty());
    EXPECT_THAT(device.n_multiprocessors, Gt(0));
    EXPECT_THAT(device.memory_bytes, Gt(int64_t{1} << 30));
    EXPECT_LE(device.memory_free_bytes, device.memory_bytes);
    EXPECT_THAT(Describe(device), HasSubstr(device.name));
    RecordProperty("device", Describe(device));
  }
}

TEST(CudaStatusTest, CodesOfCuda) {
  EXPECT_OK(CudaStatus(cudaSuccess, "x"));
  EXPECT_THAT(CudaStatus(cudaErrorMemoryAllocation, "weights"),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       HasSubstr("weights: cudaErrorMemoryAllocation")));
  EXPECT_THAT(CudaStatus(cudaErrorNoDevice, "x"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(CudaStatus(cudaErrorInsufficientDriver, "x"),
              HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_FALSE(IsDeviceBroken(CudaStatus(cudaErrorInvalidValue, "x")));
  EXPECT_TRUE(IsDeviceBroken(CudaStatus(cudaErrorIllegalAddress, "x")));
  EXPECT_TRUE(IsDeviceBroken(CudaStatus(cudaErrorLaunchFailure, "x")));
  EXPECT_FALSE(IsDeviceBroken(absl::InternalError("x")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
