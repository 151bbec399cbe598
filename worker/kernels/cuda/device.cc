#include "worker/kernels/cuda/device.h"

#include <cuda_runtime_api.h>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {
namespace {

absl::StatusOr<DeviceInfo> Query(int index) {
  cudaDeviceProp properties{};
  WALSH_RETURN_IF_ERROR(
      CudaStatus(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties"));
  DeviceInfo info{.index = index,
                  .name = properties.name,
                  .compute_major = properties.major,
                  .compute_minor = properties.minor,
                  .n_multiprocessors = properties.multiProcessorCount,
                  .l2_bytes = properties.l2CacheSize};
  int before = 0;
  WALSH_RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&before), "cudaGetDevice"));
  WALSH_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(index), "cudaSetDevice"));
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  const absl::Status status =
      CudaStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  WALSH_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(before), "cudaSetDevice"));
  WALSH_RETURN_IF_ERROR(status);
  info.memory_bytes = static_cast<int64_t>(total_bytes);
  info.memory_free_bytes = static_cast<int64_t>(free_bytes);
  return info;
}

}  // namespace

absl::StatusOr<std::vector<DeviceInfo>> ListDevices() {
  int n_devices = 0;
  WALSH_RETURN_IF_ERROR(CudaStatus(cudaGetDeviceCount(&n_devices), "cudaGetDeviceCount"));
  std::vector<DeviceInfo> devices;
  for (int index = 0; index < n_devices; ++index) {
    WALSH_ASSIGN_OR_RETURN(DeviceInfo info, Query(index));
    devices.push_back(std::move(info));
  }
  return devices;
}

}  // namespace walsh::kernels::cuda
