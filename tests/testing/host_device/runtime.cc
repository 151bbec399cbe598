// The part of CUDA's runtime that worker/pipeline/cuda, worker/engine/cuda and their tests call, on
// the host: device memory is the heap's, and every call has finished when it returns.
//
// So the orchestration of a job on a device is tested without one, under AddressSanitizer, too:
// buffers have exactly their size there, and what is used after it was freed is found. What it
// cannot find is a missing dependency between streams; compute-sanitizer and tests/gpu can.
#include <cuda_runtime_api.h>
#include <malloc.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kTotalBytes = size_t{64} << 30;
std::atomic<size_t> used_bytes = 0;

int64_t& NanosecondsOf(cudaEvent_t event) {
  return *static_cast<int64_t*>(static_cast<void*>(event));
}

}  // namespace

extern "C" {

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheHost"; }
const char* cudaGetErrorString(cudaError_t) { return "error of the host's device"; }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = kTotalBytes - used_bytes;
  *total_bytes = kTotalBytes;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** pointer, size_t n_bytes, cudaStream_t) {
  // The pool's alignment, which vectorized loads rely on.
  if (posix_memalign(pointer, 256, n_bytes) != 0) return cudaErrorMemoryAllocation;
  used_bytes += malloc_usable_size(*pointer);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  used_bytes -= malloc_usable_size(pointer);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t n_bytes, unsigned) {
  *pointer = std::malloc(n_bytes);
  return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes, cudaMemcpyKind) {
  if (n_bytes > 0) std::memcpy(to, from, n_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (n_bytes > 0) std::memcpy(to, from, n_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t) {
  if (n_bytes > 0) std::memset(to, value, n_bytes);
  return cudaSuccess;
}

// Nothing is captured: what would be has happened.
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return cudaErrorNotSupported;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) {
  return cudaErrorNotSupported;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  // The time of its record; something that the leak checker sees when it is not destroyed.
  void* const nanoseconds = std::calloc(1, sizeof(int64_t));
  *event = static_cast<cudaEvent_t>(nanoseconds);
  return nanoseconds != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  NanosecondsOf(event) =
      std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = static_cast<float>(static_cast<double>(NanosecondsOf(end) - NanosecondsOf(begin)) / 1e6);
  return cudaSuccess;
}

}  // extern "C"
