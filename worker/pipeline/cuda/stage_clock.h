// Device time by kind of work: events around pieces of a stream, read once a layer is done so that
// nothing waits in between.
//
// Threads: used by one thread
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::pipeline::cuda {

class StageClock {
 public:
  explicit StageClock(cudaStream_t stream) : stream_(stream) {}
  ~StageClock() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;

  // Work queued from here on counts for `total`, in milliseconds.
  absl::Status Enter(double* total) {
    if (totals_.size() == events_.size()) {
      cudaEvent_t event = nullptr;
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event));
      events_.push_back(event);
    }
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(events_[totals_.size()], stream_));
    totals_.push_back(total);
    return absl::OkStatus();
  }
  // Waits for the stream and adds what was measured to the totals.
  absl::Status Finish() {
    double unused = 0;
    if (absl::Status status = Enter(&unused); !status.ok()) return status;
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(events_[totals_.size() - 1]));
    for (size_t i = 0; i + 1 < totals_.size(); ++i) {
      float ms = 0;
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]));
      *totals_[i] += static_cast<double>(ms);
    }
    totals_.clear();
    return absl::OkStatus();
  }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;  // kept for the next layer
  std::vector<double*> totals_;      // of the running one; entry i begins at event i
};

}  // namespace walsh::pipeline::cuda
