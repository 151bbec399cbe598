// A vector whose values are whatever was in memory until they are written: for hundreds of
// megabytes that something else fills at once, such as a copy from a device.
#pragma once

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace walsh {

// Constructs without arguments by default-initialization, which does nothing to a number.
template <typename T>
struct UninitializedAllocator : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = UninitializedAllocator<U>;
  };
  template <typename U>
  void construct(U* at) {
    ::new (static_cast<void*>(at)) U;
  }
  template <typename U, typename... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
};

template <typename T>
using UninitializedVector = std::vector<T, UninitializedAllocator<T>>;

}  // namespace walsh
