// Where jobs run, as --device of walsh-worker and of `walsh up` says it.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

struct DeviceChoice {
  enum class Kind {
    kAuto,  // CUDA device 0 where it works, else the CPU
    kCpu,
    kCuda,
  };
  Kind kind = Kind::kAuto;
  int cuda_device = 0;
};

// "auto", "cpu", "cuda" (device 0) or "cuda:N". INVALID_ARGUMENT names the text and these.
absl::StatusOr<DeviceChoice> ParseDeviceChoice(std::string_view text);

}  // namespace walsh
