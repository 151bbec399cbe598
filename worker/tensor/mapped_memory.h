// Anonymous pages straight from the system, for large pieces that live long or come and go.
//
// Malloc is the wrong place for them when they need an alignment: glibc before 2.38 does not reuse
// what aligned allocation splits off, and what is freed in the middle of the heap stays with the
// process. Pages are zero, cost nothing until they are touched, and go back to the system at once.
//
// Threads: distinct objects are independent
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/check.h"

namespace walsh {

class MappedMemory {
 public:
  MappedMemory() = default;
  // `alignment` is a power of two. Empty when the system refuses, and for no bytes.
  static MappedMemory Create(size_t size, size_t alignment) {
    WALSH_CHECK((alignment & (alignment - 1)) == 0);
    MappedMemory memory;
    const size_t spare = alignment > kPageBytes ? alignment : 0;
    if (size == 0 || size > SIZE_MAX - spare - kPageBytes) return memory;
    const size_t rounded = (size + kPageBytes - 1) / kPageBytes * kPageBytes;
    void* base = mmap(nullptr, rounded + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      /*fd=*/-1, /*offset=*/0);
    if (base == MAP_FAILED) return memory;
    auto* bytes = static_cast<uint8_t*>(base);
    const size_t head = spare == 0 ? 0 : (0 - reinterpret_cast<uintptr_t>(bytes)) & (alignment - 1);
    if (head > 0) munmap(bytes, head);
    if (spare > head) munmap(bytes + head + rounded, spare - head);
    memory.data_ = bytes + head;
    memory.size_ = rounded;
    return memory;
  }
  MappedMemory(MappedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedMemory& operator=(MappedMemory&& other) noexcept {
    MappedMemory old(std::move(*this));
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  ~MappedMemory() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  // Gives the whole pages of a range back to the system; they are zero again when touched. A
  // refusal is no error: the memory stays.
  void Discard(size_t offset, size_t size) {
    WALSH_CHECK(offset <= size_ && size <= size_ - offset);
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));  // the system rounds ends up
    const size_t first = (offset + page - 1) / page * page;
    const size_t end = (offset + size) / page * page;
    if (first < end) madvise(data_ + first, end - first, MADV_DONTNEED);
  }

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }  // whole pages
  bool empty() const { return data_ == nullptr; }

 private:
  // The smallest that any supported system has: larger ones only waste less.
  static constexpr size_t kPageBytes = 4096;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace walsh
