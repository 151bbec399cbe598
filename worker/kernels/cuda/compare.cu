#include <algorithm>
#include <bit>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/compare.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
// Enough to fill any device; each then takes many values.
constexpr int64_t kBlocksMax = 2048;

// What the blocks agree on. Doubles that are not negative are ordered as their bits are.
struct Found {
  unsigned long long largest;
  unsigned long long difference;
  long long first_bad;
};
constexpr long long kNone = std::numeric_limits<long long>::max();

__global__ void __launch_bounds__(kThreads)
    CompareKernel(int64_t n, const float* a, const float* b, Found* found) {
  __shared__ double doubles[kThreads / kWarpSize];
  __shared__ long long indices[kThreads / kWarpSize];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  double largest = 0;
  double difference = 0;
  long long first_bad = kNone;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    if (isfinite(a[i]) && isfinite(b[i])) {
      const double x = a[i];
      largest = max(largest, fabs(x));
      difference = max(difference, fabs(x - static_cast<double>(b[i])));
    } else {
      first_bad = min(first_bad, static_cast<long long>(i));
    }
  }
  largest = BlockReduce<Max>(largest, doubles);
  difference = BlockReduce<Max>(difference, doubles);
  first_bad = BlockReduce<Min>(first_bad, indices);
  if (threadIdx.x != 0) return;
  atomicMax(&found->largest, static_cast<unsigned long long>(__double_as_longlong(largest)));
  atomicMax(&found->difference, static_cast<unsigned long long>(__double_as_longlong(difference)));
  atomicMin(&found->first_bad, first_bad);
}

}  // namespace

absl::StatusOr<Difference> Compare(Context& context, int64_t n, const float* a, const float* b) {
  if (n < 0) return absl::InvalidArgumentError(absl::StrCat("Compare: ", n, " values"));
  const cudaStream_t stream = context.stream();
  Found found = {.largest = 0, .difference = 0, .first_bad = kNone};
  if (n > 0) {
    WALSH_ASSIGN_OR_RETURN(auto on_device, DeviceBuffer<Found>::Allocate(1, stream));
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(on_device.data(), &found, sizeof(found), cudaMemcpyHostToDevice, stream));
    const auto blocks = static_cast<unsigned>(std::min(kBlocksMax, (n + kThreads - 1) / kThreads));
    CompareKernel<<<blocks, kThreads, 0, stream>>>(n, a, b, on_device.data());
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("Compare", stream);
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(&found, on_device.data(), sizeof(found), cudaMemcpyDeviceToHost, stream));
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
  }
  return Difference{.largest = std::bit_cast<double>(found.largest),
                    .difference = std::bit_cast<double>(found.difference),
                    .first_bad = found.first_bad == kNone ? -1 : found.first_bad};
}

}  // namespace walsh::kernels::cuda
