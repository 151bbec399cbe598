// Large results from the device to the host's own memory: in pieces, through pinned memory, from
// where threads copy one piece while the next one arrives.
//
// Errors:  RESOURCE_EXHAUSTED; the device's
// Memory:  two pieces (read_ahead.h) of pinned memory
// Threads: used by one thread; waits for the copy
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::PinnedPool;

struct DownloadPart {
  const void* from = nullptr;  // on the device
  void* to = nullptr;
  int64_t n_bytes = 0;
};

// All of them, behind what the context's stream has to do before.
absl::Status DownloadStaged(kernels::cuda::Context& context, PinnedPool& pinned, ThreadPool& pool,
                            std::span<const DownloadPart> parts);

}  // namespace walsh::pipeline::cuda
