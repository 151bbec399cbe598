// The functions of cuBLAS that we call, forwarded to the library that LoadLibraries has loaded;
// before that, or where it lacks one, they return NOT_INITIALIZED.
//
// Hidden, so that the library's calls of itself go past these. A function that is called and not
// listed here does not link.
#include <cublas_v2.h>

#include <atomic>

#include "worker/kernels/cuda/libraries.h"

namespace walsh::kernels::cuda {
namespace {

// The function of that name, kept in `known` once found.
template <typename Function>
Function Resolve(std::atomic<Function>& known, const char* name) {
  Function function = known.load(std::memory_order_acquire);
  if (function == nullptr) {
    function = reinterpret_cast<Function>(LibraryFunction(name));
    known.store(function, std::memory_order_release);
  }
  return function;
}

}  // namespace
}  // namespace walsh::kernels::cuda

#define WALSH_FORWARD(result, name, unavailable, parameters, arguments)     \
  extern "C" __attribute__((visibility("hidden"))) result name parameters { \
    static std::atomic<result(*) parameters> known{nullptr};                \
    const auto function = ::walsh::kernels::cuda::Resolve(known, #name);    \
    return function == nullptr ? (unavailable) : function arguments;        \
  }
#define WALSH_FORWARD_CUBLAS(name, parameters, arguments) \
  WALSH_FORWARD(cublasStatus_t, name, CUBLAS_STATUS_NOT_INITIALIZED, parameters, arguments)

WALSH_FORWARD(const char*, cublasGetStatusString, "cuBLAS is not loaded", (cublasStatus_t status),
              (status))
WALSH_FORWARD_CUBLAS(cublasCreate_v2, (cublasHandle_t * handle), (handle))
WALSH_FORWARD_CUBLAS(cublasDestroy_v2, (cublasHandle_t handle), (handle))
WALSH_FORWARD_CUBLAS(cublasSetStream_v2, (cublasHandle_t handle, cudaStream_t stream),
                     (handle, stream))
WALSH_FORWARD_CUBLAS(cublasGemmEx,
                     (cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                      int n, int k, const void* alpha, const void* a, cudaDataType a_type, int a_ld,
                      const void* b, cudaDataType b_type, int b_ld, const void* beta, void* c,
                      cudaDataType c_type, int c_ld, cublasComputeType_t compute,
                      cublasGemmAlgo_t algorithm),
                     (handle, op_a, op_b, m, n, k, alpha, a, a_type, a_ld, b, b_type, b_ld, beta, c,
                      c_type, c_ld, compute, algorithm))
WALSH_FORWARD_CUBLAS(cublasSgemm_v2,
                     (cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                      int n, int k, const float* alpha, const float* a, int a_ld, const float* b,
                      int b_ld, const float* beta, float* c, int c_ld),
                     (handle, op_a, op_b, m, n, k, alpha, a, a_ld, b, b_ld, beta, c, c_ld))
WALSH_FORWARD_CUBLAS(cublasDgemm_v2,
                     (cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                      int n, int k, const double* alpha, const double* a, int a_ld, const double* b,
                      int b_ld, const double* beta, double* c, int c_ld),
                     (handle, op_a, op_b, m, n, k, alpha, a, a_ld, b, b_ld, beta, c, c_ld))
WALSH_FORWARD_CUBLAS(cublasSgemmStridedBatched,
                     (cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                      int n, int k, const float* alpha, const float* a, int a_ld,
                      long long int a_stride, const float* b, int b_ld, long long int b_stride,
                      const float* beta, float* c, int c_ld, long long int c_stride, int batch),
                     (handle, op_a, op_b, m, n, k, alpha, a, a_ld, a_stride, b, b_ld, b_stride,
                      beta, c, c_ld, c_stride, batch))
WALSH_FORWARD_CUBLAS(cublasDgemmStridedBatched,
                     (cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                      int n, int k, const double* alpha, const double* a, int a_ld,
                      long long int a_stride, const double* b, int b_ld, long long int b_stride,
                      const double* beta, double* c, int c_ld, long long int c_stride, int batch),
                     (handle, op_a, op_b, m, n, k, alpha, a, a_ld, a_stride, b, b_ld, b_stride,
                      beta, c, c_ld, c_stride, batch))
WALSH_FORWARD_CUBLAS(cublasSsyrk_v2,
                     (cublasHandle_t handle, cublasFillMode_t triangle, cublasOperation_t op_a,
                      int n, int k, const float* alpha, const float* a, int a_ld, const float* beta,
                      float* c, int c_ld),
                     (handle, triangle, op_a, n, k, alpha, a, a_ld, beta, c, c_ld))
WALSH_FORWARD_CUBLAS(cublasDsyrk_v2,
                     (cublasHandle_t handle, cublasFillMode_t triangle, cublasOperation_t op_a,
                      int n, int k, const double* alpha, const double* a, int a_ld,
                      const double* beta, double* c, int c_ld),
                     (handle, triangle, op_a, n, k, alpha, a, a_ld, beta, c, c_ld))
WALSH_FORWARD_CUBLAS(cublasStrmm_v2,
                     (cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t triangle,
                      cublasOperation_t op_a, cublasDiagType_t diagonal, int m, int n,
                      const float* alpha, const float* a, int a_ld, const float* b, int b_ld,
                      float* c, int c_ld),
                     (handle, side, triangle, op_a, diagonal, m, n, alpha, a, a_ld, b, b_ld, c,
                      c_ld))
WALSH_FORWARD_CUBLAS(cublasDtrmm_v2,
                     (cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t triangle,
                      cublasOperation_t op_a, cublasDiagType_t diagonal, int m, int n,
                      const double* alpha, const double* a, int a_ld, const double* b, int b_ld,
                      double* c, int c_ld),
                     (handle, side, triangle, op_a, diagonal, m, n, alpha, a, a_ld, b, b_ld, c,
                      c_ld))
