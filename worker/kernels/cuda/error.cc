#include "worker/kernels/cuda/error.h"

#include <cstdlib>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace walsh::cuda {
namespace {

constexpr char kPoisonedUrl[] = "type.walsh/CudaContextPoisoned";

// Documented as leaving the process in a state where it must be relaunched.
bool IsSticky(cudaError_t error) {
  switch (static_cast<int>(error)) {
    case 226:  // cudaErrorContained
    case 700:  // cudaErrorIllegalAddress
    case 702:  // cudaErrorLaunchTimeout
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
      return true;
    default:
      return false;
  }
}

}  // namespace

absl::Status OutOfMemory(std::string_view what, int64_t bytes_needed) {
  size_t free = 0;
  size_t total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) cudaGetLastError();
  return absl::ResourceExhaustedError(
      absl::StrCat(std::string(what), ": out of device memory: ", bytes_needed, " bytes needed, ",
                   free, " of ", total, " free"));
}

absl::Status CudaStatus(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // clears what is not sticky
  const std::string text = absl::StrCat(std::string(what), ": ", cudaGetErrorString(error), " (",
                                        static_cast<int>(error), ")");
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(text);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorSystemDriverMismatch:
      return absl::FailedPreconditionError(text);
    default:
      break;
  }
  absl::Status status = absl::InternalError(text);
  if (IsSticky(error)) status.SetPayload(kPoisonedUrl, absl::Cord());
  return status;
}

bool IsPoisoned(const absl::Status& status) { return status.GetPayload(kPoisonedUrl).has_value(); }

absl::Status LaunchStatus(std::string_view kernel, cudaStream_t stream) {
  static const bool synchronous = [] {
    const char* value = std::getenv("WALSH_SYNC_LAUNCHES");
    return value != nullptr && value[0] == '1';
  }();
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && synchronous) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) return absl::OkStatus();
  return CudaStatus(error, absl::StrCat("kernel ", std::string(kernel)));
}

}  // namespace walsh::cuda
