#include "worker/kernels/cuda/low_bit_gemm_kernel.cuh"

namespace walsh::kernels::cuda::low_bit_gemm {

absl::Status Launch3(const LaunchPlan& plan) { return LaunchWidth<3, false>(plan); }

}  // namespace walsh::kernels::cuda::low_bit_gemm
