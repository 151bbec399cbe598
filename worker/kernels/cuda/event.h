// A point in a stream's work, for another stream or the host to wait for.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {

// Nothing is waited for before the first Record.
class Event {
 public:
  Event() = default;
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // All work that is queued on `stream` by now.
  absl::Status Record(cudaStream_t stream) {
    if (event_ == nullptr) {
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    }
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(event_, stream));
    return absl::OkStatus();
  }
  absl::Status Wait() const {
    if (event_ == nullptr) return absl::OkStatus();
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(event_));
    return absl::OkStatus();
  }
  // What is queued on `stream` from here on waits.
  absl::Status Hold(cudaStream_t stream) const {
    if (event_ == nullptr) return absl::OkStatus();
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream, event_, 0));
    return absl::OkStatus();
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace walsh::kernels::cuda
