// What lies between the product with the weights of q, k and v and attention, in one launch: the
// transform of qkv_transform.h; q goes out in bf16, k and v into the pool. Rows that decode have it
// in PagedDecodeAttention's launch, with the same bits.
//
// Bound:   launch and latency for few rows, then memory
// Shapes:  row-major; a row of qkv has the heads of q, then k's, then v's
// Errors:  INVALID_ARGUMENT  sizes that do not fit, named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/qkv_transform.h"

namespace walsh::kernels::cuda {

struct QkvToCacheParams {
  KvBatch batch;  // all of its rows; those of no sequence are left out
  KvPoolLayer pool;
  int64_t n_heads = 0;
  // One of the two, [n_rows, (n_heads + 2 n_kv_heads) · head_dim].
  const float* qkv_float = nullptr;
  const bf16* qkv_bf16 = nullptr;
  int64_t qkv_stride = 0;  // 0: as many as a row has; even
  QkvTransform transform;
  bf16* q = nullptr;     // [n_rows, n_heads · head_dim]
  int64_t q_stride = 0;  // 0: n_heads · head_dim; even
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

inline constexpr int64_t kCacheHeadDimMax = 256;

absl::Status QkvToCache(const QkvToCacheParams& params);

}  // namespace walsh::kernels::cuda
