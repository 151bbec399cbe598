// cuda::BlockWalsh as a share of a device-to-device copy measured in the same run.
//
// Both read and write each byte once. Buffers are far larger than the L2 cache; each figure is the
// median of the timed runs after warm-up.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "worker/kernels/cuda/block_walsh.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarmUps = 5;
constexpr int kRuns = 31;

// Median seconds of `call`, which returns a status.
template <typename Call>
absl::StatusOr<double> MedianSeconds(Call call) {
  cudaEvent_t start{};
  cudaEvent_t stop{};
  absl::Status status = CudaStatus(cudaEventCreate(&start), "cudaEventCreate");
  status.Update(CudaStatus(cudaEventCreate(&stop), "cudaEventCreate"));
  std::vector<float> milliseconds;
  for (int run = -kWarmUps; run < kRuns && status.ok(); ++run) {
    status.Update(CudaStatus(cudaEventRecord(start), "cudaEventRecord"));
    status.Update(call());
    status.Update(CudaStatus(cudaEventRecord(stop), "cudaEventRecord"));
    status.Update(CudaStatus(cudaEventSynchronize(stop), "cudaEventSynchronize"));
    float elapsed = 0;
    status.Update(CudaStatus(cudaEventElapsedTime(&elapsed, start, stop), "cudaEventElapsedTime"));
    if (run >= 0) milliseconds.push_back(elapsed);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  if (!status.ok()) return status;
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kRuns / 2, milliseconds.end());
  return milliseconds[kRuns / 2] / 1e3;
}

absl::Status Run() {
  const auto devices = ListDevices();
  if (!devices.ok()) return devices.status();
  std::printf("%s\n", Describe(devices->front()).c_str());
  const int64_t n_floats =
      std::min<int64_t>(int64_t{1} << 28, devices->front().memory_free_bytes / 16) & ~0xFFFF;
  const double n_bytes = 4.0 * static_cast<double>(n_floats);
  void* x = nullptr;
  void* y = nullptr;
  absl::Status status = CudaStatus(cudaMalloc(&x, static_cast<size_t>(n_bytes)), "cudaMalloc");
  status.Update(CudaStatus(cudaMalloc(&y, static_cast<size_t>(n_bytes)), "cudaMalloc"));
  if (!status.ok()) return status;
  cudaMemset(x, 0, static_cast<size_t>(n_bytes));
  const auto copy = MedianSeconds([&] {
    return CudaStatus(
        cudaMemcpyAsync(y, x, static_cast<size_t>(n_bytes), cudaMemcpyDeviceToDevice, nullptr),
        "cudaMemcpyAsync");
  });
  if (!copy.ok()) return copy.status();
  std::printf("%-44s %9.1f us %8.1f GB/s\n", "device copy", *copy * 1e6, 2 * n_bytes / *copy / 1e9);
  for (const bool sequency : {true, false}) {
    for (const int64_t block : {16, 32, 64, 128, 256}) {
      for (const int64_t padding : {0, 4}) {
        const int64_t cols = 4096;
        const int64_t stride = cols + padding;
        const int64_t rows = n_floats / stride;
        const auto seconds = MedianSeconds([&] {
          return BlockWalsh({.rows = rows,
                             .cols = cols,
                             .block = block,
                             .sequency = sequency,
                             .x = static_cast<float*>(x),
                             .x_stride = stride},
                            nullptr);
        });
        if (!seconds.ok()) return seconds.status();
        const double moved = 8.0 * static_cast<double>(rows * cols);
        std::printf("%s %3d, rows %6d x 4096, stride %4d %13.1f us %8.1f GB/s %5.1f %% of copy\n",
                    sequency ? "walsh   " : "hadamard", static_cast<int>(block),
                    static_cast<int>(rows), static_cast<int>(stride), *seconds * 1e6,
                    moved / *seconds / 1e9, 100.0 * (moved / *seconds) / (2 * n_bytes / *copy));
      }
    }
  }
  cudaFree(x);
  cudaFree(y);
  return absl::OkStatus();
}

}  // namespace
}  // namespace walsh::kernels::cuda

int main() {
  const absl::Status status = walsh::kernels::cuda::Run();
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
