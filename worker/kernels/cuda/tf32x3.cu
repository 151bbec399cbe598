#include <cublas_v2.h>

#include <algorithm>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/tf32.cuh"
#include "worker/kernels/cuda/tf32x3.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void SplitTf32Kernel(int64_t n, const float* x, float* high, float* low) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const float value = x[i];
  const float h = RoundToTf32(value);
  high[i] = h;
  low[i] = RoundToTf32(value - h);
}

}  // namespace

absl::Status SplitTf32(Context& context, int64_t n, const float* x, float* high, float* low) {
  if (n == 0) return absl::OkStatus();
  SplitTf32Kernel<<<static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0,
                    context.stream()>>>(n, x, high, low);
  return LaunchStatus("SplitTf32", context.stream());
}

absl::Status GemmTf32x3(Context& context, const GemmTf32x3Params& p) {
  if (p.n_tokens == 0 || p.out == 0) return absl::OkStatus();
  const float one = 1.0f;
  // The small products first.
  const struct {
    const float* x;
    const float* weights;
    float beta;
  } products[] = {{p.x_low, p.weights_high, 0.0f},
                  {p.x_high, p.weights_low, 1.0f},
                  {p.x_high, p.weights_high, 1.0f}};
  // cuBLAS is column-major: yᵀ = W xᵀ.
  for (const auto& product : products) {
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(
        context.blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(p.out),
        static_cast<int>(p.n_tokens), static_cast<int>(p.in), &one, product.weights, CUDA_R_32F,
        static_cast<int>(p.in), product.x, CUDA_R_32F, static_cast<int>(p.in), &product.beta, p.y,
        CUDA_R_32F, static_cast<int>(p.out), CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
