// Memory for packed weights: aligned to vectors and backed by huge pages.
//
// A decoding pass walks through all weights, and with pages of 4 KiB it waits for address
// translations (in a virtual machine, two walks for each): on a Zen 4 one thread reads 20 GB/s from
// small pages and 28 from huge ones. Most matrices are smaller than a huge page, so they are cut
// from shared regions; a region is freed when the last matrix in it is.
//
// Threads: safe
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace walsh::kernels::cpu {

// Zeroed bytes at a multiple of 64.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size);
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<uint8_t> data_;
  size_t size_ = 0;
};

// The same as numbers. T is an integer type.
template <typename T>
class WeightArray {
 public:
  WeightArray() = default;
  explicit WeightArray(int64_t size) : bytes_(static_cast<size_t>(size) * sizeof(T)) {}
  T* data() { return reinterpret_cast<T*>(bytes_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data()); }
  bool empty() const { return bytes_.size() == 0; }
  int64_t size() const { return static_cast<int64_t>(bytes_.size() / sizeof(T)); }
  int64_t size_bytes() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  AlignedBytes bytes_;
};

}  // namespace walsh::kernels::cpu
