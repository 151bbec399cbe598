// BlockWalsh on device memory: see BlockWalshParams for the operation.
//
// Bound:   memory: each element is read and written once, 8 bytes for block additions; the measured
//          share of a device copy is what bench/block_walsh_cuda_bench prints.
// Errors:  INVALID_ARGUMENT  as every BlockWalsh, and a block outside 16 … 256
//          INTERNAL          the launch failed
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "worker/kernels/params.h"

namespace walsh::kernels::cuda {

inline constexpr int64_t kWalshBlockMin = 16;
inline constexpr int64_t kWalshBlockMax = 256;

// p.x points to device memory.
absl::Status BlockWalsh(const BlockWalshParams& p, cudaStream_t stream);

}  // namespace walsh::kernels::cuda
