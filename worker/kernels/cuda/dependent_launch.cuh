// Kernels whose start may overlap the end of the one before them in the stream (programmatic
// dependent launch). To ask for it needs a device of compute 9.0 or later.
//
// A kernel that is launched this way calls WaitForPreviousKernel in every CTA before it touches
// memory that is not constant over the whole chain, or returns: a kernel is done for the next only
// when all before it are.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "absl/status/status.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/current_device.h"

namespace walsh::kernels::cuda {

__device__ __forceinline__ void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Lets a kernel have so much dynamic shared memory, and asks for the split of L1 and shared memory
// that all kernels of a chain want: another one would have to wait until a multiprocessor is empty.
// Does so once for each device; safe from several threads.
template <auto kKernel>
absl::Status PrepareOnce(int shared_bytes_max = 0) {
  static std::atomic<uint64_t> prepared{0};  // a bit for each device
  int device = 0;
  WALSH_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  const uint64_t device_bit = uint64_t{1} << (device % kDevicesMax);
  if ((prepared.load(std::memory_order_acquire) & device_bit) != 0) return absl::OkStatus();
  if (shared_bytes_max > 0) {
    WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
        kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_max));
  }
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  prepared.fetch_or(device_bit, std::memory_order_release);
  return absl::OkStatus();
}

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // CTAs of a cluster, neighbours in x
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

template <typename... Params>
absl::Status LaunchKernel(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                          const std::type_identity_t<Params>&... args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned n_attributes = 0;
  if (shape.overlap_previous) {
    cudaLaunchAttribute& attribute = attributes[n_attributes++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[n_attributes++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  WALSH_CUDA_RETURN_IF_ERROR(cudaLaunchKernelEx(&config, kernel, args...));
  return LaunchStatus(name, shape.stream);
}

}  // namespace walsh::kernels::cuda
