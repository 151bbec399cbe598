#include "absl/strings/str_format.h"
#include "worker/kernels/cuda/device.h"

namespace walsh::kernels::cuda {

std::string Describe(const DeviceInfo& device) {
  constexpr double kMiB = 1 << 20;
  constexpr double kGiB = 1 << 30;
  return absl::StrFormat(
      "cuda:%d %s, compute %d.%d, %d multiprocessors, %.1f GiB (%.1f free), L2 %.1f MiB",
      device.index, device.name, device.compute_major, device.compute_minor,
      device.n_multiprocessors, static_cast<double>(device.memory_bytes) / kGiB,
      static_cast<double>(device.memory_free_bytes) / kGiB,
      static_cast<double>(device.l2_bytes) / kMiB);
}

}  // namespace walsh::kernels::cuda
