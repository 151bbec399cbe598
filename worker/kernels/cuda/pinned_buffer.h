// Host memory that a device copies from and to beside other work.
//
// Errors:  RESOURCE_EXHAUSTED  the host has no such memory, or may not lock it
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {

class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  static absl::StatusOr<PinnedBuffer> Allocate(int64_t n_bytes) {
    PinnedBuffer buffer;
    const cudaError_t error =
        cudaHostAlloc(&buffer.data_, static_cast<size_t>(n_bytes), cudaHostAllocDefault);
    if (error != cudaSuccess) {
      return CudaStatus(error,
                        absl::StrCat("cudaHostAlloc of ", n_bytes, " bytes of the host's memory"));
    }
    buffer.size_ = n_bytes;
    return buffer;
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) cudaFreeHost(data_);
  }
  PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  int64_t size() const { return size_; }
  std::span<std::byte> span() {
    return {static_cast<std::byte*>(data_), static_cast<size_t>(size_)};
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace walsh::kernels::cuda
