#include "worker/kernels/cpu/weight_memory.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>

#include "worker/tensor/mapped_memory.h"

namespace walsh::kernels::cpu {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kHugePageBytes = 2 << 20;
constexpr size_t kRegionBytes = 32 << 20;
// What is larger than this has a region of its own.
constexpr size_t kSharedBytesMax = kRegionBytes / 4;

size_t RoundUp(size_t n, size_t step) { return (n + step - 1) / step * step; }

// `size` is a multiple of the huge page's.
std::shared_ptr<uint8_t> NewRegion(size_t size) {
  MappedMemory memory = MappedMemory::Create(size, kHugePageBytes);
  if (memory.empty()) throw std::bad_alloc();
  // A kernel without huge pages refuses, and nothing but speed is lost.
  madvise(memory.data(), memory.size(), MADV_HUGEPAGE);
  const auto owner = std::make_shared<MappedMemory>(std::move(memory));
  return {owner, owner->data()};
}

// The region that is being filled.
class Arena {
 public:
  std::shared_ptr<uint8_t> Cut(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<uint8_t> region = region_.lock();
    if (region == nullptr || used_ + size > kRegionBytes) {
      region = NewRegion(kRegionBytes);
      region_ = region;
      used_ = 0;
    }
    uint8_t* data = region.get() + used_;
    used_ += size;
    return {std::move(region), data};  // shares the region's ownership
  }

 private:
  std::mutex mutex_;
  std::weak_ptr<uint8_t> region_;  // owned by the matrices in it
  size_t used_ = 0;
};

}  // namespace

AlignedBytes::AlignedBytes(size_t size) : size_(size) {
  static Arena& arena = *new Arena;  // never destroyed: weights may outlive static objects
  if (size == 0) return;
  data_ = size <= kSharedBytesMax ? arena.Cut(RoundUp(size, kAlign))
                                  : NewRegion(RoundUp(size, kHugePageBytes));
}

}  // namespace walsh::kernels::cpu
