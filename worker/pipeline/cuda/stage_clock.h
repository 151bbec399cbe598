// Device time by kind of work: events around pieces of a stream, read once a layer is done so that
// nothing waits in between, unless others want the device.
//
// Between two kinds of work a step of the job ends (Progress::YieldIfWanted). What the job waits
// there or elsewhere while the clock runs is counted for no kind: the stream is empty meanwhile,
// so that it is the time between two events less that of the host's wait.
//
// Threads: used by one thread
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/pipeline/progress.h"

namespace walsh::pipeline::cuda {

class StageClock {
 public:
  // `progress` may be null: then no step ends here.
  explicit StageClock(cudaStream_t stream, Progress* progress = nullptr)
      : stream_(stream), progress_(progress) {}
  ~StageClock() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;

  // Work queued from here on counts for `total`, in milliseconds.
  absl::Status Enter(double* total) {
    if (progress_ != nullptr) WALSH_RETURN_IF_ERROR(progress_->YieldIfWanted());
    return Mark(total);
  }
  // Waits for the stream and adds what was measured to the totals.
  absl::Status Finish() {
    WALSH_RETURN_IF_ERROR(Mark(nullptr));
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(events_[entries_.size() - 1]));
    for (size_t i = 0; i + 1 < entries_.size(); ++i) {
      float ms = 0;
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]));
      const double yielded = entries_[i + 1].seconds_yielded - entries_[i].seconds_yielded;
      *entries_[i].total += static_cast<double>(ms) - yielded * 1e3;
    }
    entries_.clear();
    return absl::OkStatus();
  }

 private:
  struct Entry {
    double* total;
    double seconds_yielded;  // by the job, until then
  };

  absl::Status Mark(double* total) {
    if (entries_.size() == events_.size()) {
      cudaEvent_t event = nullptr;
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event));
      events_.push_back(event);
    }
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(events_[entries_.size()], stream_));
    entries_.push_back({total, progress_ == nullptr ? 0 : progress_->seconds_yielded()});
    return absl::OkStatus();
  }

  cudaStream_t stream_;
  Progress* const progress_;
  std::vector<cudaEvent_t> events_;  // kept for the next layer
  std::vector<Entry> entries_;       // of the running one; entry i begins at event i
};

}  // namespace walsh::pipeline::cuda
