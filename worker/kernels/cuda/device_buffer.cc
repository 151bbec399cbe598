#include "worker/kernels/cuda/device_buffer.h"

#include <atomic>

#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::kernels::cuda {
namespace {

std::atomic<int64_t> bytes_now{0};
std::atomic<int64_t> bytes_peak{0};
std::atomic<int64_t> fail_countdown{0};

void CountAllocation(int64_t n_bytes) {
  const int64_t now = bytes_now.fetch_add(n_bytes) + n_bytes;
  int64_t peak = bytes_peak.load();
  while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {
  }
}

}  // namespace

MemoryUse DeviceMemoryUse() { return {bytes_now.load(), bytes_peak.load()}; }
void ResetDeviceMemoryPeak() { bytes_peak.store(bytes_now.load()); }
void FailAllocationForTest(int64_t nth) { fail_countdown.store(nth); }

absl::StatusOr<void*> AllocateDevice(int64_t n_bytes, cudaStream_t stream) {
  if (fail_countdown.load() > 0 && fail_countdown.fetch_sub(1) == 1) {
    return OutOfMemory("allocation (failed by a test)", n_bytes);
  }
  void* pointer = nullptr;
  const cudaError_t error = cudaMallocAsync(&pointer, static_cast<size_t>(n_bytes), stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return OutOfMemory("cudaMallocAsync", n_bytes);
  }
  if (error != cudaSuccess) return CudaStatus(error, "cudaMallocAsync");
  CountAllocation(n_bytes);
  return pointer;
}

void FreeDevice(void* pointer, int64_t n_bytes, cudaStream_t stream) {
  // A poisoned context cannot free either; the process is about to exit then.
  if (cudaFreeAsync(pointer, stream) != cudaSuccess) cudaGetLastError();
  bytes_now.fetch_sub(n_bytes);
}

}  // namespace walsh::kernels::cuda
