#include "common/device_choice.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace walsh {

absl::StatusOr<DeviceChoice> ParseDeviceChoice(std::string_view text) {
  constexpr std::string_view kNumbered = "cuda:";
  if (text == "auto") return DeviceChoice{};
  if (text == "cpu") return DeviceChoice{.kind = DeviceChoice::Kind::kCpu};
  if (text == "cuda") return DeviceChoice{.kind = DeviceChoice::Kind::kCuda};
  if (text.starts_with(kNumbered)) {
    const std::string number(text.substr(kNumbered.size()));
    int device = 0;
    // Spelled out again: signs, spaces and leading zeros are no part of a number's one spelling.
    if (absl::SimpleAtoi(number, &device) && device >= 0 && absl::StrCat(device) == number) {
      return DeviceChoice{.kind = DeviceChoice::Kind::kCuda, .cuda_device = device};
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--device '", std::string(text),
                   "' is not auto, cpu, cuda or cuda:N (N: number of a device, from 0)"));
}

}  // namespace walsh
