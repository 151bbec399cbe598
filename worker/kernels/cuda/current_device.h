// What a launch asks the current device for.
#pragma once

#include "absl/status/statusor.h"

namespace walsh::kernels::cuda {

// Devices that are told apart where something is kept for each.
inline constexpr int kDevicesMax = 64;

struct CurrentDevice {
  int index = 0;
  int compute_major = 0;
  int compute_minor = 0;
  int n_multiprocessors = 0;
};
// Asked for once a device: an engine launches thousands of products a second. Safe from any thread.
absl::StatusOr<CurrentDevice> GetCurrentDevice();

}  // namespace walsh::kernels::cuda
