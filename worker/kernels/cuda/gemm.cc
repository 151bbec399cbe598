// Matrix products through cuBLAS.
//
// cuBLAS is column-major: a row-major [a, b] is its [b, a]. So y = x Wᵀ becomes yᵀ = W xᵀ, with W
// transposed in its view.
#include <cublas_v2.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"

namespace walsh::kernels::cuda {
namespace {

// Columns of a block of the Hessian: wide enough for full tensor-core rate, narrow enough that the
// half above the diagonal is mostly left out.
constexpr int64_t kGramBlock = 2048;

template <typename Out>
absl::Status GemmAs(Context& context, const GemmParams<Out>& p, cudaDataType_t out_type) {
  if (p.n_tokens == 0 || p.out == 0) return absl::OkStatus();
  const float one = 1.0f;
  const float beta = p.accumulate ? 1.0f : 0.0f;
  const int64_t y_stride = p.y_stride == 0 ? p.out : p.y_stride;
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(
      context.blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(p.out),
      static_cast<int>(p.n_tokens), static_cast<int>(p.in), &one, p.weights, CUDA_R_16BF,
      static_cast<int>(p.in), p.x, CUDA_R_16BF, static_cast<int>(p.in), &beta, p.y, out_type,
      static_cast<int>(y_stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return absl::OkStatus();
}

}  // namespace

absl::Status Gemm(Context& context, const GemmParams<bf16>& params) {
  return GemmAs(context, params, CUDA_R_16BF);
}
absl::Status Gemm(Context& context, const GemmParams<float>& params) {
  return GemmAs(context, params, CUDA_R_32F);
}

absl::Status GemmFp32(Context& context, const GemmFp32Params& p) {
  if (p.n_tokens == 0 || p.out == 0) return absl::OkStatus();
  const float one = 1.0f;
  const float beta = p.accumulate ? 1.0f : 0.0f;
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(
      context.blas(), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(p.out),
      static_cast<int>(p.n_tokens), static_cast<int>(p.in), &one, p.weights, CUDA_R_32F,
      static_cast<int>(p.in), p.x, CUDA_R_32F, static_cast<int>(p.in), &beta, p.y, CUDA_R_32F,
      static_cast<int>(p.out), CUBLAS_COMPUTE_32F_PEDANTIC, CUBLAS_GEMM_DEFAULT));
  return absl::OkStatus();
}

absl::Status AccumulateGram(Context& context, const GramParams& p) {
  if (p.n_tokens == 0) return absl::OkStatus();
  const float one = 1.0f;
  const auto ld = static_cast<int>(p.dim);
  for (int64_t j = 0; j < p.dim; j += kGramBlock) {
    const auto width = static_cast<int>(std::min(kGramBlock, p.dim - j));
    const auto height = static_cast<int>(p.dim - j);
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(
        context.blas(), CUBLAS_OP_N, CUBLAS_OP_T, height, width, static_cast<int>(p.n_tokens), &one,
        p.x + j, CUDA_R_16BF, ld, p.x + j, CUDA_R_16BF, ld, &one, p.h + j * p.dim + j, CUDA_R_32F,
        ld, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
  return absl::OkStatus();
}

absl::Status AccumulateCrossGram(Context& context, const CrossGramParams& p) {
  if (p.n_tokens == 0 || p.dim == 0) return absl::OkStatus();
  const float one = 1.0f;
  const auto dim = static_cast<int>(p.dim);
  // Column-major Cᵀ = Yᵀ X.
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasGemmEx(context.blas(), CUBLAS_OP_N, CUBLAS_OP_T, dim, dim,
                                            static_cast<int>(p.n_tokens), &one, p.y, CUDA_R_16BF,
                                            dim, p.x, CUDA_R_16BF, dim, &one, p.c, CUDA_R_32F, dim,
                                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
