#include "worker/kernels/cuda/context.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/libraries.h"

namespace walsh::kernels::cuda {

absl::Status CublasStatus(cublasStatus_t status, std::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string text = absl::StrCat(std::string(what), ": ", cublasGetStatusString(status));
  if (status == CUBLAS_STATUS_ALLOC_FAILED) return OutOfMemoryError(text);
  // An error of a kernel before it is told by the library first, as its own.
  if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
    return CudaStatus(error, text);
  }
  return absl::InternalError(text);
}

absl::StatusOr<std::unique_ptr<Context>> Context::Create(int device, Priority priority) {
  int n_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  // A driver without a device has none of this number, like any other.
  if (error == cudaErrorNoDevice) {
    cudaGetLastError();
    n_devices = 0;
  } else {
    WALSH_RETURN_IF_ERROR(CudaStatus(error, "cudaGetDeviceCount"));
  }
  if (device < 0 || device >= n_devices) {
    return absl::FailedPreconditionError(
        absl::StrCat("no CUDA device ", device, ": this machine has ", n_devices));
  }
  WALSH_RETURN_IF_ERROR(LoadLibraries());
  std::unique_ptr<Context> context(new Context());
  context->device_ = device;
  WALSH_CUDA_RETURN_IF_ERROR(cudaSetDevice(device));
  WALSH_RETURN_IF_ERROR(CheckKernelImage());
  WALSH_CUDA_RETURN_IF_ERROR(cudaGetDeviceProperties(&context->properties_, device));
  cudaMemPool_t pool = nullptr;
  WALSH_CUDA_RETURN_IF_ERROR(cudaDeviceGetDefaultMemPool(&pool, device));
  uint64_t keep_all = UINT64_MAX;
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all));
  WALSH_RETURN_IF_ERROR(context->CreateStreams(priority));
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasCreate(&context->blas_));
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasSetStream(context->blas_, context->stream_));
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasCreate(&context->side_blas_));
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasSetStream(context->side_blas_, context->side_));
  return context;
}

absl::Status Context::CreateStreams(Priority priority) {
  int least = 0;  // a larger number than `greatest`
  int greatest = 0;
  WALSH_CUDA_RETURN_IF_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const int value = priority == Priority::kServing ? greatest : least;
  for (cudaStream_t* stream : {&stream_, &side_, &copies_}) {
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, value));
  }
  return absl::OkStatus();
}

Context::~Context() {
  if (side_blas_ != nullptr) cublasDestroy(side_blas_);
  if (blas_ != nullptr) cublasDestroy(blas_);
  if (copies_ != nullptr) cudaStreamDestroy(copies_);
  if (side_ != nullptr) cudaStreamDestroy(side_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::Status Context::Synchronize() {
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream_));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(side_));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(copies_));
  return absl::OkStatus();
}

absl::Status Context::MakeCurrent() const {
  WALSH_CUDA_RETURN_IF_ERROR(cudaSetDevice(device_));
  return absl::OkStatus();
}

absl::Status Context::ReleaseUnusedMemory() {
  WALSH_RETURN_IF_ERROR(Synchronize());
  cudaMemPool_t pool = nullptr;
  WALSH_CUDA_RETURN_IF_ERROR(cudaDeviceGetDefaultMemPool(&pool, device_));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemPoolTrimTo(pool, 0));
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
