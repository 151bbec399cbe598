// CUDA errors as statuses, and what poisons a process.
//
// Errors:  RESOURCE_EXHAUSTED  out of device memory; the message holds what was needed and what is
// free
//          FAILED_PRECONDITION no driver, no device, or a device that this build has no code for
//          INTERNAL            everything else; poisoned when the CUDA context cannot be used again
// Threads: safe.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"

namespace walsh::cuda {

// OK for cudaSuccess. `what` names the operation ("cudaMemcpyAsync", "kernel GptqBlock").
absl::Status CudaStatus(cudaError_t error, std::string_view what);
absl::Status OutOfMemory(std::string_view what, int64_t bytes_needed);

// True when the status says that every later CUDA call of this process will fail: the worker then
// reports, drains and exits (reference: the sticky set of the CUDA runtime's documentation).
bool IsPoisoned(const absl::Status& status);

}  // namespace walsh::cuda

#define WALSH_CUDA_RETURN_IF_ERROR(call)                          \
  do {                                                            \
    const cudaError_t walsh_cuda_error_ = (call);                 \
    if (walsh_cuda_error_ != cudaSuccess) {                       \
      return ::walsh::cuda::CudaStatus(walsh_cuda_error_, #call); \
    }                                                             \
  } while (false)

// After a kernel launch: its configuration error, and under WALSH_SYNC_LAUNCHES=1 its run-time
// error.
#define WALSH_CUDA_RETURN_IF_LAUNCH_FAILED(kernel, stream)                                       \
  do {                                                                                           \
    if (::absl::Status walsh_s_ = ::walsh::cuda::LaunchStatus(kernel, stream); !walsh_s_.ok()) { \
      return walsh_s_;                                                                           \
    }                                                                                            \
  } while (false)

namespace walsh::cuda {
absl::Status LaunchStatus(std::string_view kernel, cudaStream_t stream);
}  // namespace walsh::cuda
