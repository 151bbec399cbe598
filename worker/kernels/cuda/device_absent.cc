// Stands for device.cc in builds without CUDA.
#include "worker/kernels/cuda/device.h"

namespace walsh::kernels::cuda {

absl::StatusOr<std::vector<DeviceInfo>> ListDevices() {
  return absl::FailedPreconditionError("this build has no CUDA backend (WALSH_CUDA=OFF)");
}

}  // namespace walsh::kernels::cuda
