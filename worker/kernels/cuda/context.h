// One device with its streams and library handles.
//
// Errors:  FAILED_PRECONDITION  no such device, or one that this build has no code for
// Threads: used by one thread at a time
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::kernels::cuda {

class Context {
 public:
  static absl::StatusOr<std::unique_ptr<Context>> Create(int device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  int device() const { return device_; }
  const cudaDeviceProp& properties() const { return properties_; }
  // Forward passes and the quantizer run on `stream`, factorizations and copies beside it on
  // `side`.
  cudaStream_t stream() const { return stream_; }
  cudaStream_t side() const { return side_; }
  // Bound to `stream` and to `side`.
  cublasHandle_t blas() const { return blas_; }
  cublasHandle_t side_blas() const { return side_blas_; }
  cusolverDnHandle_t side_solver() const { return side_solver_; }
  absl::Status Synchronize();

 private:
  Context() = default;
  int device_ = 0;
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  cudaStream_t side_ = nullptr;
  cublasHandle_t blas_ = nullptr;
  cublasHandle_t side_blas_ = nullptr;
  cusolverDnHandle_t side_solver_ = nullptr;
};

absl::Status CublasStatus(cublasStatus_t status, std::string_view what);
absl::Status CusolverStatus(cusolverStatus_t status, std::string_view what);

}  // namespace walsh::kernels::cuda

#define WALSH_CUBLAS_RETURN_IF_ERROR(call) \
  WALSH_RETURN_IF_ERROR(::walsh::kernels::cuda::CublasStatus((call), #call))
#define WALSH_CUSOLVER_RETURN_IF_ERROR(call) \
  WALSH_RETURN_IF_ERROR(::walsh::kernels::cuda::CusolverStatus((call), #call))
