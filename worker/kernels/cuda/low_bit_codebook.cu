#include "worker/kernels/cuda/low_bit_kernel.cuh"

namespace walsh::kernels::cuda::low_bit {

absl::Status LaunchCodebook(const LaunchPlan& plan) { return LaunchWidth<2, true>(plan); }

}  // namespace walsh::kernels::cuda::low_bit
