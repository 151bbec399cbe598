// The products of cuBLAS in both precisions under one name, for kernels that are written for both.
#pragma once

#include <cublas_v2.h>

namespace walsh::kernels::cuda {

inline cublasStatus_t Gemm(cublasHandle_t blas, cublasOperation_t op_a, cublasOperation_t op_b,
                           int m, int n, int k, float alpha, const float* a, int a_ld,
                           const float* b, int b_ld, float beta, float* c, int c_ld) {
  return cublasSgemm(blas, op_a, op_b, m, n, k, &alpha, a, a_ld, b, b_ld, &beta, c, c_ld);
}
inline cublasStatus_t Gemm(cublasHandle_t blas, cublasOperation_t op_a, cublasOperation_t op_b,
                           int m, int n, int k, double alpha, const double* a, int a_ld,
                           const double* b, int b_ld, double beta, double* c, int c_ld) {
  return cublasDgemm(blas, op_a, op_b, m, n, k, &alpha, a, a_ld, b, b_ld, &beta, c, c_ld);
}

// C = alpha · A · B, `batch` of them.
inline cublasStatus_t GemmBatched(cublasHandle_t blas, int m, int n, int k, float alpha,
                                  const float* a, int a_ld, long long a_stride, const float* b,
                                  int b_ld, long long b_stride, float* c, int c_ld,
                                  long long c_stride, int batch) {
  const float zero = 0;
  return cublasSgemmStridedBatched(blas, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &alpha, a, a_ld,
                                   a_stride, b, b_ld, b_stride, &zero, c, c_ld, c_stride, batch);
}
inline cublasStatus_t GemmBatched(cublasHandle_t blas, int m, int n, int k, double alpha,
                                  const double* a, int a_ld, long long a_stride, const double* b,
                                  int b_ld, long long b_stride, double* c, int c_ld,
                                  long long c_stride, int batch) {
  const double zero = 0;
  return cublasDgemmStridedBatched(blas, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &alpha, a, a_ld,
                                   a_stride, b, b_ld, b_stride, &zero, c, c_ld, c_stride, batch);
}

inline cublasStatus_t Syrk(cublasHandle_t blas, cublasFillMode_t triangle, cublasOperation_t op_a,
                           int n, int k, float alpha, const float* a, int a_ld, float beta,
                           float* c, int c_ld) {
  return cublasSsyrk(blas, triangle, op_a, n, k, &alpha, a, a_ld, &beta, c, c_ld);
}
inline cublasStatus_t Syrk(cublasHandle_t blas, cublasFillMode_t triangle, cublasOperation_t op_a,
                           int n, int k, double alpha, const double* a, int a_ld, double beta,
                           double* c, int c_ld) {
  return cublasDsyrk(blas, triangle, op_a, n, k, &alpha, a, a_ld, &beta, c, c_ld);
}

// Triangular A, from the left or the right, not transposed.
inline cublasStatus_t Trmm(cublasHandle_t blas, cublasSideMode_t side, cublasFillMode_t triangle,
                           int m, int n, float alpha, const float* a, int a_ld, const float* b,
                           int b_ld, float* c, int c_ld) {
  return cublasStrmm(blas, side, triangle, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, m, n, &alpha, a, a_ld,
                     b, b_ld, c, c_ld);
}
inline cublasStatus_t Trmm(cublasHandle_t blas, cublasSideMode_t side, cublasFillMode_t triangle,
                           int m, int n, double alpha, const double* a, int a_ld, const double* b,
                           int b_ld, double* c, int c_ld) {
  return cublasDtrmm(blas, side, triangle, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, m, n, &alpha, a, a_ld,
                     b, b_ld, c, c_ld);
}

}  // namespace walsh::kernels::cuda
