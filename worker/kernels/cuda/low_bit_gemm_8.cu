#include "worker/kernels/cuda/low_bit_gemm_kernel.cuh"

namespace walsh::kernels::cuda::low_bit_gemm {

absl::Status Launch8(const LaunchPlan& plan) { return LaunchWidth<8, false>(plan); }

}  // namespace walsh::kernels::cuda::low_bit_gemm
