// The two halves of FactorHessian: a Cholesky factorization, and the inverse of its factor.
//
// Matrices are row-major [n, n] in device memory; work goes to `stream`, to which `blas` is bound.
//
// Errors:  RESOURCE_EXHAUSTED
// Threads: asynchronous
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

// Side of the diagonal blocks that are inverted along with the factorization.
inline constexpr int kFactorBlock = 128;

// Factorizes A = L Lᵀ in place, from A's lower triangle. Diagonal blocks become the inverses of
// L's; below them stands L, and nothing certain above. Where A is not positive definite, some
// element of the result's diagonal is not positive or not finite.
// Memory: a block.
absl::Status FactorLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, float* a);

// L⁻¹ in place, from what FactorLower leaves; what stands above the diagonal becomes zero.
// Memory: n² / 4 floats.
absl::Status InvertLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, float* l);

}  // namespace walsh::kernels::cuda
