// Pinned memory for the length of a job: what one step gives back the next one takes, since the
// system takes longer to lock pages than a device to copy what they hold.
//
// Errors:  those of pinned_buffer.h
// Threads: used by one thread
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/pinned_buffer.h"

namespace walsh::kernels::cuda {

class PinnedPool {
 public:
  // A buffer that goes back to the pool, which outlives it. No copy may use it any more by then.
  class Lease {
   public:
    Lease() = default;
    ~Lease() {
      if (pool_ != nullptr) pool_->free_.push_back(std::move(buffer_));
    }
    Lease(Lease&& other) noexcept { *this = std::move(other); }
    Lease& operator=(Lease&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(buffer_, other.buffer_);
      return *this;
    }
    std::span<std::byte> span() { return buffer_.span(); }

   private:
    friend class PinnedPool;
    Lease(PinnedPool* pool, PinnedBuffer buffer) : pool_(pool), buffer_(std::move(buffer)) {}
    PinnedPool* pool_ = nullptr;
    PinnedBuffer buffer_;
  };

  PinnedPool() = default;
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // Of at least `n_bytes`: the smallest free one that will do.
  absl::StatusOr<Lease> Take(int64_t n_bytes) {
    auto best = free_.end();
    for (auto buffer = free_.begin(); buffer != free_.end(); ++buffer) {
      const bool is_better = best == free_.end() || buffer->size() < best->size();
      if (buffer->size() >= n_bytes && is_better) best = buffer;
    }
    if (best == free_.end()) {
      WALSH_ASSIGN_OR_RETURN(PinnedBuffer buffer, PinnedBuffer::Allocate(n_bytes));
      return Lease(this, std::move(buffer));
    }
    Lease lease(this, std::move(*best));
    free_.erase(best);
    return lease;
  }
  // Gives what is free back to the system.
  void Clear() { free_.clear(); }

 private:
  std::vector<PinnedBuffer> free_;
};

}  // namespace walsh::kernels::cuda
