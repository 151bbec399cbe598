// Inverse of a lower triangular matrix, in place, by doubling.
//
// The diagonal blocks come inverted; each level joins pairs of inverted blocks:
//     | A  0 |⁻¹    |  A⁻¹          0  |
//     | B  C |    = | −C⁻¹ B A⁻¹   C⁻¹ |
// Small levels take two batched products, which count the zeros of A⁻¹ and C⁻¹ as work; large ones,
// with nearly all of it, two products with triangular matrices for each of their few pairs.
//
// cuBLAS is column-major: a row-major matrix is its transpose there, and a lower one upper.
//
// Bound: arithmetic: n³/3 flop in fp32.
#include <algorithm>

#include "common/status_macros.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/triangular.h"

namespace walsh::kernels::cuda {
namespace {

// Least size of A from which a pair fills the device alone.
constexpr int64_t kTriangularMin = 2048;
constexpr cublasFillMode_t kOurLower = CUBLAS_FILL_MODE_UPPER;

__global__ void ZeroAboveDiagonalBlocks(int64_t n, float* l) {
  const int64_t row = blockIdx.y;
  const int64_t begin = (row / kFactorBlock + 1) * kFactorBlock;
  const int64_t column = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column < n) l[row * n + column] = 0.0f;
}

// C[m, n] = alpha · A[m, k] · B[k, n], row-major, `batch` of them.
struct Product {
  int64_t m, n, k;
  float alpha;
  const float* a;
  int64_t a_ld, a_stride;
  const float* b;
  int64_t b_ld, b_stride;
  float* c;
  int64_t c_ld, c_stride;
  int64_t batch;
};
absl::Status Multiply(cublasHandle_t blas, const Product& p) {
  const float zero = 0.0f;
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasSgemmStridedBatched(
      blas, CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(p.n), static_cast<int>(p.m),
      static_cast<int>(p.k), &p.alpha, p.b, static_cast<int>(p.b_ld), p.b_stride, p.a,
      static_cast<int>(p.a_ld), p.a_stride, &zero, p.c, static_cast<int>(p.c_ld), p.c_stride,
      static_cast<int>(p.batch)));
  return absl::OkStatus();
}

// `batch` pairs, the first at offset `first`; A is [s, s], C [r, r]. Both are inverted.
struct Pairs {
  int64_t first, s, r, batch;
};

absl::Status JoinByProducts(cublasHandle_t blas, int64_t n, const Pairs& pairs, float* l,
                            float* scratch) {
  const auto [first, s, r, batch] = pairs;
  const int64_t step = 2 * s * (n + 1);
  float* a = l + first * (n + 1);
  float* b = a + s * n;
  float* c = a + s * (n + 1);
  WALSH_RETURN_IF_ERROR(Multiply(blas, {.m = r,
                                        .n = s,
                                        .k = r,
                                        .alpha = 1.0f,
                                        .a = c,
                                        .a_ld = n,
                                        .a_stride = step,
                                        .b = b,
                                        .b_ld = n,
                                        .b_stride = step,
                                        .c = scratch,
                                        .c_ld = s,
                                        .c_stride = r * s,
                                        .batch = batch}));
  return Multiply(blas, {.m = r,
                         .n = s,
                         .k = s,
                         .alpha = -1.0f,
                         .a = scratch,
                         .a_ld = s,
                         .a_stride = r * s,
                         .b = a,
                         .b_ld = n,
                         .b_stride = step,
                         .c = b,
                         .c_ld = n,
                         .c_stride = step,
                         .batch = batch});
}

absl::Status JoinTriangular(cublasHandle_t blas, int64_t n, const Pairs& pairs, float* l,
                            float* scratch) {
  const float one = 1.0f;
  const float minus_one = -1.0f;
  const auto ld = static_cast<int>(n);
  const auto s = static_cast<int>(pairs.s);
  const auto r = static_cast<int>(pairs.r);
  for (int64_t i = 0; i < pairs.batch; ++i) {
    float* a = l + (pairs.first + i * 2 * pairs.s) * (n + 1);
    float* b = a + pairs.s * n;
    const float* c = a + pairs.s * (n + 1);
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasStrmm(blas, CUBLAS_SIDE_RIGHT, kOurLower, CUBLAS_OP_N,
                                             CUBLAS_DIAG_NON_UNIT, s, r, &one, c, ld, b, ld,
                                             scratch, s));
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasStrmm(blas, CUBLAS_SIDE_LEFT, kOurLower, CUBLAS_OP_N,
                                             CUBLAS_DIAG_NON_UNIT, s, r, &minus_one, a, ld, scratch,
                                             s, b, ld));
  }
  return absl::OkStatus();
}

absl::Status Join(cublasHandle_t blas, int64_t n, const Pairs& pairs, float* l, float* scratch) {
  if (pairs.batch == 0 || pairs.r == 0) return absl::OkStatus();
  if (pairs.s >= kTriangularMin) return JoinTriangular(blas, n, pairs, l, scratch);
  return JoinByProducts(blas, n, pairs, l, scratch);
}

}  // namespace

absl::Status InvertLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, float* l) {
  if (n == 0) return absl::OkStatus();
  ZeroAboveDiagonalBlocks<<<dim3(static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>(n)),
                            256, 0, stream>>>(n, l);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("ZeroAboveDiagonalBlocks", stream);
  // A level's results, all of them: r · s where r + s ≤ n, or half of its blocks of s ≤ n/2.
  WALSH_ASSIGN_OR_RETURN(auto scratch, DeviceBuffer<float>::Allocate(n * n / 4, stream));
  for (int64_t s = kFactorBlock; s < n; s *= 2) {
    const int64_t n_pairs = n / (2 * s);
    const int64_t rest = n % (2 * s);
    WALSH_RETURN_IF_ERROR(
        Join(blas, n, {.first = 0, .s = s, .r = s, .batch = n_pairs}, l, scratch.data()));
    WALSH_RETURN_IF_ERROR(
        Join(blas, n, {.first = n - rest, .s = s, .r = std::max<int64_t>(rest - s, 0), .batch = 1},
             l, scratch.data()));
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
