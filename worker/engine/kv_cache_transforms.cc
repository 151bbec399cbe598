#include "worker/engine/kv_cache_transforms.h"

#include <bit>
#include <cstdint>

namespace walsh::engine {
namespace {

constexpr double kClipOf4Bits = 0.95;

}  // namespace

OnlineTransforms WithKvCache(const OnlineTransforms& artifact, KvCacheDtype dtype,
                             const ModelConfig& config) {
  OnlineTransforms online = artifact;
  if (dtype == KvCacheDtype::kAuto) return online;
  online.kv_cache = {};
  if (dtype == KvCacheDtype::kBf16) {
    online.query_key = {};
    return online;
  }
  const bool is_narrow = dtype == KvCacheDtype::kInt4;
  online.kv_cache = {.bits = is_narrow ? 4 : 8,
                     .group_size = config.head_dim,
                     .symmetric = false,
                     .clip_ratio = is_narrow ? kClipOf4Bits : 1.0};
  if (online.query_key.block == 0 && std::has_single_bit(static_cast<uint64_t>(config.head_dim))) {
    online.query_key = {.block = config.head_dim, .sequency = true};
  }
  return online;
}

}  // namespace walsh::engine
