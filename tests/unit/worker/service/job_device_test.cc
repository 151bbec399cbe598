#include "worker/service/job_device.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/service/fake_backend.h"
#include "worker/kernels/device_failure.h"
#include "worker/service/describe.h"

namespace walsh::service {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::StatusIs;

class JobDeviceTest : public ::testing::Test {
 protected:
  absl::StatusOr<JobDevice> Open(std::string_view device) {
    return OpenJobDevice(*ParseDeviceChoice(device), cuda_);
  }
  json Describe(std::string_view device) {
    return json::parse(DescribeMachine(*ParseDeviceChoice(device), cuda_));
  }

  FakeDevice device_;
  const CudaDevices cuda_ = FakeCudaDevices(&device_);
};

TEST_F(JobDeviceTest, AutoTakesTheFirstCudaDevice) {
  for (const char* choice : {"auto", "cuda", "cuda:0"}) {
    ASSERT_OK_AND_ASSIGN(const JobDevice device, Open(choice));
    EXPECT_EQ(device.backend->name(), "cuda:0");
    EXPECT_EQ(device.name, "cuda:0 NVIDIA H200");
    EXPECT_OK(device.no_cuda);
    EXPECT_THAT(DescribeDevice(device, 2), HasSubstr("cuda:0 NVIDIA H200, host cpu ("));
  }
  const json described = Describe("auto");
  EXPECT_EQ(described["jobs_on"], "cuda:0 NVIDIA H200");
  EXPECT_EQ(described["generation_on"], "cuda:0 NVIDIA H200");
  EXPECT_TRUE(described["cuda"]["available"].get<bool>());
  EXPECT_THAT(described["cuda"]["devices"][0].get<std::string>(), HasSubstr("80.0 GiB"));
  EXPECT_FALSE(described["cuda"].contains("reason"));
}

TEST_F(JobDeviceTest, AutoTakesTheCpuWhereThereIsNoneAndSaysWhy) {
  device_.opened = absl::FailedPreconditionError("cuBLAS is not on this machine");
  ASSERT_OK_AND_ASSIGN(const JobDevice device, Open("auto"));
  EXPECT_EQ(device.name, "cpu");
  EXPECT_EQ(device.backend->name(), "cpu");
  EXPECT_THAT(device.no_cuda, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("cuBLAS")));
  EXPECT_THAT(DescribeDevice(device, 2), ::testing::StartsWith("cpu ("));
  const json described = Describe("auto");
  EXPECT_EQ(described["jobs_on"], "cpu");
  EXPECT_FALSE(described["cuda"]["available"].get<bool>());
  EXPECT_EQ(described["cuda"]["devices"].size(), 1) << "found, though of no use";
  EXPECT_EQ(described["cuda"]["reason"], "cuBLAS is not on this machine");
}

TEST_F(JobDeviceTest, CpuIsTheCpuWhateverElseThereIs) {
  ASSERT_OK_AND_ASSIGN(const JobDevice device, Open("cpu"));
  EXPECT_EQ(device.name, "cpu");
  EXPECT_OK(device.no_cuda);
  const json described = Describe("cpu");
  EXPECT_EQ(described["jobs_on"], "cpu");
  EXPECT_TRUE(described["cuda"]["available"].get<bool>());
}

TEST_F(JobDeviceTest, ANamedDeviceThatIsNotThereIsNoneAtAll) {
  EXPECT_THAT(Open("cuda:3"), StatusIs(absl::StatusCode::kFailedPrecondition,
                                       HasSubstr("--device cuda:3: there is no such device")));
  const json described = Describe("cuda:3");
  EXPECT_THAT(described["jobs_on"].get<std::string>(), HasSubstr("nothing: cuda:3"));
  EXPECT_EQ(described["cuda"]["reason"], "there is no such device");
}

// Without a GPU the real ones say why; with one they open it.
TEST_F(JobDeviceTest, TheInstalledDevicesAreThereOrSayWhyNot) {
  const auto opened = InstalledCudaDevices().open(0);
  if (!opened.ok()) {
    EXPECT_THAT(opened.status(),
                StatusIs(absl::StatusCode::kFailedPrecondition, Not(HasSubstr("\n"))));
    EXPECT_FALSE(opened.status().message().empty());
  } else {
    EXPECT_EQ((*opened)->name(), "cuda:0");
  }
}

TEST(DeviceBrokenErrorTest, IsRetriedAndKeepsTheMarkHere) {
  const absl::Status cause = MarkDeviceBroken(absl::InternalError("a fault"));
  const absl::Status status = DeviceBrokenError("cuda:0 NVIDIA H200", cause);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("INTERNAL: a fault")));
  EXPECT_EQ(ErrorReason(status), "DEVICE_BROKEN");
  EXPECT_FALSE(IsDeviceBroken(status));
}

}  // namespace
}  // namespace walsh::service
