#include "worker/kernels/cuda/cuda_status.h"

#include <cstdlib>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"
#include "worker/kernels/device_failure.h"

namespace walsh::kernels::cuda {
namespace {

// The errors that CUDA 13's header documents as leaving the process in an inconsistent state, and
// those after which no call was seen to succeed.
bool LeavesProcessBroken(cudaError_t error) {
  switch (static_cast<int>(error)) {
    case 214:  // cudaErrorECCUncorrectable
    case 220:  // cudaErrorNvlinkUncorrectable
    case 226:  // cudaErrorContained
    case 700:  // cudaErrorIllegalAddress
    case 702:  // cudaErrorLaunchTimeout
    case 709:  // cudaErrorContextIsDestroyed
    case 710:  // cudaErrorAssert
    case 714:  // cudaErrorHardwareStackError
    case 715:  // cudaErrorIllegalInstruction
    case 716:  // cudaErrorMisalignedAddress
    case 717:  // cudaErrorInvalidAddressSpace
    case 718:  // cudaErrorInvalidPc
    case 719:  // cudaErrorLaunchFailure
    case 721:  // cudaErrorTensorMemoryLeak
    case 810:  // cudaErrorMpsClientTerminated
    case 911:  // cudaErrorExternalDevice
    case 999:  // cudaErrorUnknown
      return true;
    default:
      return false;
  }
}

absl::StatusCode CodeOf(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:  // also when there is no driver
    case cudaErrorStubLibrary:
    case cudaErrorNoKernelImageForDevice:
      return absl::StatusCode::kFailedPrecondition;
    case cudaErrorNoDevice:
      return absl::StatusCode::kNotFound;
    default:
      return absl::StatusCode::kInternal;
  }
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // what is not sticky must not be reported by the next call
  const std::string message = absl::StrCat(std::string(what), ": ", cudaGetErrorName(error), " (",
                                           cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) return OutOfMemoryError(message);
  absl::Status status(CodeOf(error), message);
  return LeavesProcessBroken(error) ? MarkDeviceBroken(std::move(status)) : status;
}

absl::Status OutOfMemory(std::string_view what, int64_t bytes_needed) {
  size_t free = 0;
  size_t total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) cudaGetLastError();
  return OutOfMemoryError(absl::StrCat(std::string(what), ": out of device memory: ", bytes_needed,
                                       " bytes needed, ", free, " of ", total, " free"));
}

absl::Status LaunchStatus(std::string_view kernel, cudaStream_t stream) {
  static const bool is_synchronous = [] {
    const char* value = std::getenv("WALSH_SYNC_LAUNCHES");
    return value != nullptr && std::string_view(value) == "1";
  }();
  WALSH_RETURN_IF_ERROR(CudaStatus(cudaGetLastError(), kernel));
  if (!is_synchronous) return absl::OkStatus();
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamIsCapturing(stream, &capture));
  if (capture != cudaStreamCaptureStatusNone) return absl::OkStatus();
  return CudaStatus(cudaStreamSynchronize(stream), kernel);
}

}  // namespace walsh::kernels::cuda
