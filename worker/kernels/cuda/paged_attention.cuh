// What PagedDecodeAttention and PagedPrefillAttention have in common: their launches' arguments and
// the choice of the form for a head_dim.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/kernels/cuda/paged_attention.h"

namespace walsh::kernels::cuda {

// As kernels get them.
struct PagedAttentionArguments {
  KvBatch batch;
  const unsigned char* pool;
  int64_t block_bytes;
  int64_t head_bytes;
  int n_groups;         // of a head, that have a grid each
  int group_size_log2;  // where a head has several
  int n_kv_heads;
  int queries_per_key;  // query heads of a kv head
  int window;           // 0: none
  float scale_log2;     // scores are powers of two
  const bf16* q;
  int64_t q_stride;
  bf16* y;
  int64_t y_stride;

  // The first token that the query at `position` sees.
  __device__ __forceinline__ int FirstSeen(int position) const {
    return window > 0 ? max(0, position + 1 - window) : 0;
  }
};

// INVALID_ARGUMENT for what no operation on the pool takes; `name` is the operation's.
absl::Status CheckPool(const char* name, const KvBatch& batch, const KvPoolLayer& pool);
// INVALID_ARGUMENT for vectors that are not aligned, and for what the pool's heads cannot have.
absl::Status CheckTransform(const char* name, const QkvTransform& transform,
                            const KvPoolShape& shape);
// The arguments, checked.
absl::Status MakeArguments(const char* name, const PagedAttentionParams& params,
                           PagedAttentionArguments* arguments);

// Calls launch.operator()<kDim>() for the head_dim of a pool in bf16.
template <typename Launch>
absl::Status ForHeadDim(const char* name, int64_t head_dim, const Launch& launch) {
  switch (head_dim) {
    case 16:
      return launch.template operator()<16>();
    case 32:
      return launch.template operator()<32>();
    case 48:
      return launch.template operator()<48>();
    case 64:
      return launch.template operator()<64>();
    case 96:
      return launch.template operator()<96>();
    case 128:
      return launch.template operator()<128>();
    case 256:
      return launch.template operator()<256>();
    default:
      return absl::InvalidArgumentError(absl::StrCat(name, ": head_dim ", head_dim,
                                                     ", it takes 16, 32, 48, 64, 96, 128 and 256"));
  }
}

// The same for a quantized pool, which CheckPool has taken.
template <typename Launch>
absl::Status ForQuantizedHeadDim(int64_t head_dim, const Launch& launch) {
  switch (head_dim) {
    case 32:
      return launch.template operator()<32>();
    case 64:
      return launch.template operator()<64>();
    case 96:
      return launch.template operator()<96>();
    case 128:
      return launch.template operator()<128>();
    default:
      return launch.template operator()<256>();
  }
}

}  // namespace walsh::kernels::cuda
