#include "worker/kernels/cuda/current_device.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {
namespace {

// In one word, so that it is whole when it is there.
constexpr int kMajorShift = 32;
constexpr int kMinorShift = 16;
constexpr uint64_t kFieldMask = 0xffff;

}  // namespace

absl::StatusOr<CurrentDevice> GetCurrentDevice() {
  static std::atomic<uint64_t> known[kDevicesMax];
  CurrentDevice device;
  WALSH_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device.index));
  std::atomic<uint64_t>& slot = known[device.index % kDevicesMax];
  uint64_t packed = slot.load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0;
    int minor = 0;
    int n_multiprocessors = 0;
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index));
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index));
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device.index));
    packed = static_cast<uint64_t>(major) << kMajorShift |
             static_cast<uint64_t>(minor) << kMinorShift | static_cast<uint64_t>(n_multiprocessors);
    slot.store(packed, std::memory_order_relaxed);
  }
  device.compute_major = static_cast<int>(packed >> kMajorShift);
  device.compute_minor = static_cast<int>(packed >> kMinorShift & kFieldMask);
  device.n_multiprocessors = static_cast<int>(packed & kFieldMask);
  return device;
}

}  // namespace walsh::kernels::cuda
