// Work of a stream as a graph, to be launched again and again at the cost of one call.
//
// Errors:  those of the device
// Threads: used by one thread
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::engine::cuda {

class CapturedGraph {
 public:
  CapturedGraph() = default;
  // What `queue` queues on `stream`, none of which runs. It must have run once before: a kernel's
  // code is loaded at its first launch, which cannot be captured.
  template <typename Queue>
  static absl::StatusOr<CapturedGraph> Capture(cudaStream_t stream, const Queue& queue) {
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const absl::Status queued = queue();
    cudaGraph_t graph = nullptr;
    // Ends the capture also where something failed, or the stream would stay unusable.
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    absl::StatusOr<CapturedGraph> captured = Instantiate(queued, ended, graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    return captured;
  }
  ~CapturedGraph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }
  CapturedGraph(CapturedGraph&& other) noexcept
      : executable_(std::exchange(other.executable_, nullptr)) {}
  CapturedGraph& operator=(CapturedGraph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }

  bool is_empty() const { return executable_ == nullptr; }
  absl::Status Launch(cudaStream_t stream) const {
    WALSH_CUDA_RETURN_IF_ERROR(cudaGraphLaunch(executable_, stream));
    return absl::OkStatus();
  }

 private:
  static absl::StatusOr<CapturedGraph> Instantiate(const absl::Status& queued, cudaError_t ended,
                                                   cudaGraph_t graph) {
    WALSH_RETURN_IF_ERROR(queued);
    WALSH_RETURN_IF_ERROR(kernels::cuda::CudaStatus(ended, "cudaStreamEndCapture"));
    CapturedGraph captured;
    WALSH_CUDA_RETURN_IF_ERROR(cudaGraphInstantiate(&captured.executable_, graph, 0));
    return captured;
  }

  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace walsh::engine::cuda
