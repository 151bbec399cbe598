// CUDA's errors as statuses.
//
// Errors:  RESOURCE_EXHAUSTED   device memory
//          FAILED_PRECONDITION  no driver, or one that is too old for this build
//          NOT_FOUND            no device
//          INTERNAL             anything else; IsDeviceBroken (worker/kernels/device_failure.h)
//                               tells the errors after which the process must be relaunched
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

absl::Status CudaStatus(cudaError_t error, std::string_view what);
// RESOURCE_EXHAUSTED with what was needed and what is free.
absl::Status OutOfMemory(std::string_view what, int64_t bytes_needed);

// What follows every launch. With WALSH_SYNC_LAUNCHES=1 in the environment it also waits, so that
// an error inside a kernel is reported by that kernel's name; not while `stream` is being captured
// into a graph, when nothing runs.
absl::Status LaunchStatus(std::string_view kernel, cudaStream_t stream);

}  // namespace walsh::kernels::cuda

#define WALSH_CUDA_RETURN_IF_ERROR(call)                                   \
  do {                                                                     \
    const cudaError_t walsh_cuda_error_ = (call);                          \
    if (walsh_cuda_error_ != cudaSuccess) {                                \
      return ::walsh::kernels::cuda::CudaStatus(walsh_cuda_error_, #call); \
    }                                                                      \
  } while (false)
#define WALSH_CUDA_RETURN_IF_LAUNCH_FAILED(kernel, stream)                                   \
  do {                                                                                       \
    if (::absl::Status walsh_launch_ = ::walsh::kernels::cuda::LaunchStatus(kernel, stream); \
        !walsh_launch_.ok()) {                                                               \
      return walsh_launch_;                                                                  \
    }                                                                                        \
  } while (false)
