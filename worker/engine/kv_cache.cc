#include "worker/engine/kv_cache.h"

#include "absl/strings/str_cat.h"

namespace walsh::engine {

constexpr size_t kAlign = 64;

absl::StatusOr<KvSlot> KvSlot::Allocate(int64_t n_layers, int64_t kv_width, int64_t capacity) {
  const int64_t n_bytes = BytesPerToken(n_layers, kv_width) * capacity;
  KvSlot slot;
  slot.memory_ = MappedMemory::Create(static_cast<size_t>(n_bytes), kAlign);
  if (slot.memory_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for a KV cache of ", capacity, " tokens (", n_bytes, " bytes)"));
  }
  slot.n_half_ = n_layers * capacity * kv_width;
  slot.capacity_ = capacity;
  return slot;
}

}  // namespace walsh::engine
