// One device with its streams and library handles.
//
// Errors:  FAILED_PRECONDITION  no such device, or one that this build has no code for; a library
//                               that LoadLibraries (worker/kernels/cuda/libraries.h) does not find
// Threads: used by one thread at a time, but for MakeCurrent and copies(), which another one may
// use
//          beside it
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::kernels::cuda {

// Whose blocks the device starts first where several contexts have some to start; those that run
// are not interrupted.
enum class Priority {
  kServing,  // before all others
  kJobs,
};

class Context {
 public:
  static absl::StatusOr<std::unique_ptr<Context>> Create(int device,
                                                         Priority priority = Priority::kJobs);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  int device() const { return device_; }
  const cudaDeviceProp& properties() const { return properties_; }
  // Forward passes and the quantizer run on `stream`, factorizations beside it on `side`.
  cudaStream_t stream() const { return stream_; }
  cudaStream_t side() const { return side_; }
  // Copies from and to the host that run beside both.
  cudaStream_t copies() const { return copies_; }
  // Bound to `stream` and to `side`.
  cublasHandle_t blas() const { return blas_; }
  cublasHandle_t side_blas() const { return side_blas_; }
  absl::Status Synchronize();
  // Makes the device that of the calling thread; Create has done so for its own.
  absl::Status MakeCurrent() const;
  // Gives memory that the pool holds without use back to the device, once all work is done.
  absl::Status ReleaseUnusedMemory();

 private:
  Context() = default;
  absl::Status CreateStreams(Priority priority);
  int device_ = 0;
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  cudaStream_t side_ = nullptr;
  cudaStream_t copies_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  cublasHandle_t side_blas_ = nullptr;
};

// FAILED_PRECONDITION where this build has no code for the calling thread's device.
absl::Status CheckKernelImage();

// An error of a library is that of the device where the device has one: a fault in a kernel is
// often seen first by the call after it.
absl::Status CublasStatus(cublasStatus_t status, std::string_view what);

}  // namespace walsh::kernels::cuda

#define WALSH_CUBLAS_RETURN_IF_ERROR(call) \
  WALSH_RETURN_IF_ERROR(::walsh::kernels::cuda::CublasStatus((call), #call))
