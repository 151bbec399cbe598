#include "worker/engine/kv_pool.h"

#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"

namespace walsh::engine {

constexpr size_t kAlign = 64;

absl::StatusOr<KvPool> KvPool::Create(const Shape& shape) {
  const int64_t n_bytes =
      BytesPerToken(shape.n_layers, shape.kv_width) * kKvBlockTokens * shape.n_blocks;
  KvPool pool;
  pool.memory_ = MappedMemory::Create(static_cast<size_t>(n_bytes), kAlign);
  if (pool.memory_.empty()) {
    return OutOfMemoryError(absl::StrCat("no memory for a KV cache of ",
                                         shape.n_blocks * kKvBlockTokens, " tokens (", n_bytes,
                                         " bytes)"));
  }
  pool.shape_ = shape;
  return pool;
}

void KvPool::Discard(BlockId block) {
  const size_t n_bytes = static_cast<size_t>(block_stride()) * sizeof(float);
  memory_.Discard(static_cast<size_t>(block) * n_bytes, n_bytes);
}

}  // namespace walsh::engine
