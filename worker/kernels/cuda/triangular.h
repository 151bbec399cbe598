// The two halves of FactorHessian: a Cholesky factorization, and the inverse of its factor.
//
// Matrices are row-major [n, n] in device memory; work goes to `stream`, to which `blas` is bound.
// Real is float or double.
//
// Errors:  RESOURCE_EXHAUSTED
// Threads: asynchronous
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

// Side of the diagonal blocks that are inverted along with the factorization. Those of double are
// smaller, so that a block's factor fits the shared memory of every device.
template <typename Real>
inline constexpr int kFactorBlock = 0;
template <>
inline constexpr int kFactorBlock<float> = 128;
template <>
inline constexpr int kFactorBlock<double> = 64;

// Factorizes A = L Lᵀ in place, from A's lower triangle. Diagonal blocks become the inverses of
// L's; below them stands L, and nothing certain above. Where A is not positive definite, some
// element of the result's diagonal is not positive or not finite.
// Memory: a block.
template <typename Real>
absl::Status FactorLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, Real* a);

// L⁻¹ in place, from what FactorLower leaves; what stands above the diagonal becomes zero.
// Memory: n² / 4 elements.
template <typename Real>
absl::Status InvertLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, Real* l);

}  // namespace walsh::kernels::cuda
