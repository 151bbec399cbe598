// The keys and values of one sequence, reserved in one piece when it is admitted.
//
// Layout:  keys and values each [n_layers, capacity, kv_width] floats, not initialised: attention
//          reads only rows that this sequence wrote, and pages that are never written cost nothing.
// Errors:  RESOURCE_EXHAUSTED when the memory is not there
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "absl/status/statusor.h"

namespace walsh::engine {

class KvSlot {
 public:
  KvSlot() = default;
  static absl::StatusOr<KvSlot> Allocate(int64_t n_layers, int64_t kv_width, int64_t capacity);
  static int64_t BytesPerToken(int64_t n_layers, int64_t kv_width) {
    return 2 * n_layers * kv_width * static_cast<int64_t>(sizeof(float));
  }

  float* keys() { return data_.get(); }
  float* values() { return data_.get() + n_half_; }
  int64_t capacity() const { return capacity_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t n_half_ = 0;
  int64_t capacity_ = 0;
};

}  // namespace walsh::engine
