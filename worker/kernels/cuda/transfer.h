// Vectors to the device and back, on the context's stream; both wait for the copy.
//
// Errors:  RESOURCE_EXHAUSTED, and those of the device
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"

namespace walsh::kernels::cuda {

// T may differ from the host's type in name only: 16 bits that the host holds as integers.
//
// Neither waits for anything where there is nothing to copy.
template <typename T, typename Host = T>
absl::StatusOr<DeviceBuffer<T>> Upload(Context& context, const std::vector<Host>& host) {
  static_assert(sizeof(T) == sizeof(Host));
  if (host.empty()) return DeviceBuffer<T>();
  const cudaStream_t stream = context.stream();
  WALSH_ASSIGN_OR_RETURN(auto buffer,
                         DeviceBuffer<T>::Allocate(static_cast<int64_t>(host.size()), stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(buffer.data(), host.data(), host.size() * sizeof(T),
                                             cudaMemcpyHostToDevice, stream));
  // `host` may go before a truly asynchronous copy has read it.
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
  return buffer;
}

template <typename Host, typename T>
absl::StatusOr<std::vector<Host>> Download(Context& context, const T* from, int64_t n) {
  static_assert(sizeof(T) == sizeof(Host));
  std::vector<Host> host(static_cast<size_t>(n));
  if (n == 0) return host;
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(host.data(), from, host.size() * sizeof(T),
                                             cudaMemcpyDeviceToHost, context.stream()));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context.stream()));
  return host;
}

}  // namespace walsh::kernels::cuda
