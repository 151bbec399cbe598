#include "worker/pipeline/cuda/staged_download.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/event.h"
#include "worker/kernels/cuda/read_ahead.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::Event;
using kernels::cuda::kPieceBytes;
using kernels::cuda::PinnedPool;
namespace {

// What a thread copies at once.
constexpr int64_t kSegmentBytes = int64_t{1} << 20;

class Stage {
 public:
  // Its memory may be reused by others once nothing copies into it any more, however the call ends.
  ~Stage() {
    if (is_fetching_) (void)cudaStreamSynchronize(stream_);
  }

  absl::Status Allocate(PinnedPool& pinned, int64_t n_bytes, cudaStream_t stream) {
    stream_ = stream;
    WALSH_ASSIGN_OR_RETURN(host_, pinned.Take(n_bytes));
    room_ = n_bytes;
    return absl::OkStatus();
  }
  int64_t room() const { return room_ - used_; }

  absl::Status Fetch(const std::byte* from, std::byte* to, int64_t n_bytes) {
    std::byte* host = host_.span().data() + used_;
    is_fetching_ = true;
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(host, from, static_cast<size_t>(n_bytes), cudaMemcpyDeviceToHost, stream_));
    for (int64_t done = 0; done < n_bytes; done += kSegmentBytes) {
      segments_.push_back({host + done, to + done, std::min(kSegmentBytes, n_bytes - done)});
    }
    used_ += n_bytes;
    return absl::OkStatus();
  }
  absl::Status Sent() { return arrived_.Record(stream_); }

  // Waits for what was fetched and hands it over.
  absl::Status Land(ThreadPool& pool) {
    WALSH_RETURN_IF_ERROR(arrived_.Wait());
    is_fetching_ = false;
    pool.ParallelFor(static_cast<int64_t>(segments_.size()), [&](int64_t i) {
      const Segment& segment = segments_[static_cast<size_t>(i)];
      std::memcpy(segment.to, segment.from, static_cast<size_t>(segment.n_bytes));
    });
    segments_.clear();
    used_ = 0;
    return absl::OkStatus();
  }

 private:
  struct Segment {
    const std::byte* from;
    std::byte* to;
    int64_t n_bytes;
  };
  cudaStream_t stream_ = nullptr;
  bool is_fetching_ = false;
  PinnedPool::Lease host_;
  Event arrived_;
  int64_t room_ = 0;
  int64_t used_ = 0;
  std::vector<Segment> segments_;
};

}  // namespace

absl::Status DownloadStaged(kernels::cuda::Context& context, PinnedPool& pinned, ThreadPool& pool,
                            std::span<const DownloadPart> parts) {
  int64_t total = 0;
  for (const DownloadPart& part : parts) total += part.n_bytes;
  if (total == 0) return absl::OkStatus();
  const cudaStream_t stream = context.stream();
  std::array<Stage, 2> stages;
  for (Stage& stage : stages) {
    WALSH_RETURN_IF_ERROR(stage.Allocate(pinned, std::min(kPieceBytes, total), stream));
  }
  size_t filling = 0;
  for (const DownloadPart& part : parts) {
    const auto* from = static_cast<const std::byte*>(part.from);
    auto* to = static_cast<std::byte*>(part.to);
    for (int64_t done = 0; done < part.n_bytes;) {
      if (stages[filling].room() == 0) {
        WALSH_RETURN_IF_ERROR(stages[filling].Sent());
        filling = 1 - filling;
        WALSH_RETURN_IF_ERROR(stages[filling].Land(pool));
      }
      const int64_t n = std::min(part.n_bytes - done, stages[filling].room());
      WALSH_RETURN_IF_ERROR(stages[filling].Fetch(from + done, to + done, n));
      done += n;
    }
  }
  WALSH_RETURN_IF_ERROR(stages[filling].Sent());
  WALSH_RETURN_IF_ERROR(stages[1 - filling].Land(pool));
  return stages[filling].Land(pool);
}

}  // namespace walsh::pipeline::cuda
