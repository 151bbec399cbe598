// Device memory that frees itself, from the stream-ordered pool of CUDA.
//
// The pool keeps what is freed, so that a layer's buffers cost nothing after the first layer.
// Memory is not cleared, but by AllocateZeros.
//
// Errors:  RESOURCE_EXHAUSTED with bytes needed and free
// Threads: a buffer is used by one thread at a time; allocation is safe from several
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {

// Bytes of all DeviceBuffers of the process, and the most there were since ResetPeak.
struct MemoryUse {
  int64_t bytes_now = 0;
  int64_t bytes_peak = 0;
};
MemoryUse DeviceMemoryUse();
void ResetDeviceMemoryPeak();
// Makes the n-th allocation from now fail as if memory were out, for tests; 0 turns it off.
void FailAllocationForTest(int64_t nth);

// At least one byte, from the pool in the order of `stream`; frees in that order too.
absl::StatusOr<void*> AllocateDevice(int64_t n_bytes, cudaStream_t stream);
void FreeDevice(void* pointer, int64_t n_bytes, cudaStream_t stream);

// `data` is null where there are no elements.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  static absl::StatusOr<DeviceBuffer> Allocate(int64_t n, cudaStream_t stream) {
    if (n == 0) return DeviceBuffer();
    absl::StatusOr<void*> pointer = AllocateDevice(n * static_cast<int64_t>(sizeof(T)), stream);
    if (!pointer.ok()) return pointer.status();
    return DeviceBuffer(static_cast<T*>(*pointer), n, stream);
  }
  ~DeviceBuffer() { Reset(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    if (this != &other) {
      Reset();
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
      stream_ = other.stream_;
    }
    return *this;
  }

  void Reset() {
    if (data_ != nullptr) FreeDevice(data_, size_ * static_cast<int64_t>(sizeof(T)), stream_);
    data_ = nullptr;
    size_ = 0;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  int64_t size_bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  DeviceBuffer(T* data, int64_t size, cudaStream_t stream)
      : data_(data), size_(size), stream_(stream) {}
  T* data_ = nullptr;
  int64_t size_ = 0;
  cudaStream_t stream_ = nullptr;
};

// What buffers of so many elements take. Visits them as a class does that allocates them.
class BufferBytes {
 public:
  template <typename T>
  void operator()(const DeviceBuffer<T>&, int64_t n) {
    bytes_ += n * static_cast<int64_t>(sizeof(T));
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// `buffer` becomes one of n zeros.
template <typename T>
absl::Status AllocateZeros(DeviceBuffer<T>& buffer, int64_t n, cudaStream_t stream) {
  WALSH_ASSIGN_OR_RETURN(buffer, DeviceBuffer<T>::Allocate(n, stream));
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(buffer.size_bytes()), stream));
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
