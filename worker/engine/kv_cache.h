// The keys and values of one sequence, reserved in one piece when it is admitted.
//
// Layout:  keys and values each [n_layers, capacity, kv_width] floats. Pages that are never written
//          cost nothing, and all go back to the system when the sequence ends.
// Errors:  RESOURCE_EXHAUSTED when the memory is not there
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/tensor/mapped_memory.h"

namespace walsh::engine {

class KvSlot {
 public:
  KvSlot() = default;
  static absl::StatusOr<KvSlot> Allocate(int64_t n_layers, int64_t kv_width, int64_t capacity);
  static int64_t BytesPerToken(int64_t n_layers, int64_t kv_width) {
    return 2 * n_layers * kv_width * static_cast<int64_t>(sizeof(float));
  }

  float* keys() { return reinterpret_cast<float*>(memory_.data()); }
  float* values() { return keys() + n_half_; }
  int64_t capacity() const { return capacity_; }

 private:
  MappedMemory memory_;
  int64_t n_half_ = 0;
  int64_t capacity_ = 0;
};

}  // namespace walsh::engine
