#include "common/device_choice.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;
using Kind = DeviceChoice::Kind;

TEST(ParseDeviceChoiceTest, TakesItsFourForms) {
  EXPECT_EQ(ParseDeviceChoice("auto")->kind, Kind::kAuto);
  EXPECT_EQ(ParseDeviceChoice("cpu")->kind, Kind::kCpu);
  EXPECT_EQ(ParseDeviceChoice("cuda")->kind, Kind::kCuda);
  EXPECT_EQ(ParseDeviceChoice("cuda")->cuda_device, 0);
  EXPECT_EQ(ParseDeviceChoice("cuda:0")->kind, Kind::kCuda);
  EXPECT_EQ(ParseDeviceChoice("cuda:0")->cuda_device, 0);
  EXPECT_EQ(ParseDeviceChoice("cuda:17")->cuda_device, 17);
}

TEST(ParseDeviceChoiceTest, RefusesEverythingElseByName) {
  for (const char* text :
       {"", "gpu", "CPU", "cpu ", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1 ", "cuda:01",
        "cuda:x", "cuda:1x", "cuda:99999999999", "cuda0"}) {
    EXPECT_THAT(ParseDeviceChoice(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr("'" + std::string(text) + "' is not auto, cpu, cuda or")));
  }
}

}  // namespace
}  // namespace walsh
