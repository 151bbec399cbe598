// How a device's pool stores a model's keys and values, and what is done to them before.
//
// Errors:  UNIMPLEMENTED names what no kernel does of the model's run-time transforms of keys and
//          values, or of its heads
// Threads: no state
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/io/model_config.h"
#include "worker/io/online_transforms.h"
#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/qkv_transform.h"

namespace walsh::engine::cuda {

struct KvStorage {
  kernels::cuda::KvForm form;
  kernels::cuda::HeadTransform heads = kernels::cuda::HeadTransform::kNone;  // R3

  kernels::cuda::KvPoolShape PoolShape(const ModelConfig& config, int64_t n_blocks) const {
    return {.n_blocks = n_blocks,
            .n_kv_heads = config.n_kv_heads,
            .head_dim = config.head_dim,
            .form = form};
  }
  // Of all layers.
  int64_t token_bytes(const ModelConfig& config) const {
    return config.n_layers * PoolShape(config, 1).block_bytes() / kernels::cuda::kPoolBlockTokens;
  }
};
// Of the transforms those of queries, keys and values.
absl::StatusOr<KvStorage> KvStorageOf(const OnlineTransforms& online, const ModelConfig& config);

}  // namespace walsh::engine::cuda
