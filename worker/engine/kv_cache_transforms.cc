#include "worker/engine/kv_cache_transforms.h"

#include <bit>
#include <cstdint>

namespace walsh::engine {

OnlineTransforms WithKvCache(const OnlineTransforms& artifact, KvCacheDtype dtype,
                             const ModelConfig& config) {
  OnlineTransforms online = artifact;
  if (dtype == KvCacheDtype::kAuto) return online;
  online.kv_cache = {};
  if (dtype == KvCacheDtype::kBf16) {
    online.query_key = {};
    return online;
  }
  const int bits = dtype == KvCacheDtype::kInt4 ? 4 : 8;
  online.kv_cache = {.bits = bits,
                     .group_size = config.head_dim,
                     .symmetric = false,
                     .clip_ratio = DefaultKvClip(bits)};
  if (online.query_key.block == 0 && std::has_single_bit(static_cast<uint64_t>(config.head_dim))) {
    online.query_key = {.block = config.head_dim, .sequency = true};
  }
  return online;
}

}  // namespace walsh::engine
