// What a served model does to its keys and values: what its artifact says, or what the worker's
// --kv-cache-dtype does.
//
// A cache of 8 or 4 bits that is asked for has a grid for each token and head, with R3 where the
// head's width is a power of two; an R3 of the artifact is kept. Weights do not depend on any of
// it: R3 cancels in q · kᵀ, so that a cache in bf16 needs none.
//
// Source:  docs/rotations.md, "Activations and the KV cache", for the clip ratios
#pragma once

#include "common/kv_cache_dtype.h"
#include "worker/io/model_config.h"
#include "worker/io/online_transforms.h"

namespace walsh::engine {

OnlineTransforms WithKvCache(const OnlineTransforms& artifact, KvCacheDtype dtype,
                             const ModelConfig& config);

}  // namespace walsh::engine
