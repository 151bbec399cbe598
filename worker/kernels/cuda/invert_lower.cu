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
// Bound: arithmetic: n³/3 flop.
#include <algorithm>

#include "common/status_macros.h"
#include "worker/kernels/cuda/blas_of_real.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/triangular.h"

namespace walsh::kernels::cuda {
namespace {

// Least size of A from which a pair fills the device alone.
constexpr int64_t kTriangularMin = 2048;
constexpr cublasFillMode_t kOurLower = CUBLAS_FILL_MODE_UPPER;

template <typename Real>
__global__ void ZeroAboveDiagonalBlocks(int64_t n, Real* l) {
  const int64_t row = blockIdx.y;
  const int64_t begin = (row / kFactorBlock<Real> + 1) * kFactorBlock<Real>;
  const int64_t column = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column < n) l[row * n + column] = 0;
}

// `batch` pairs, the first at offset `first`; A is [s, s], C [r, r]. Both are inverted.
struct Pairs {
  int64_t first, s, r, batch;
};

template <typename Real>
absl::Status JoinByProducts(cublasHandle_t blas, int64_t n, const Pairs& pairs, Real* l,
                            Real* scratch) {
  const auto ld = static_cast<int>(n);
  const auto s = static_cast<int>(pairs.s);
  const auto r = static_cast<int>(pairs.r);
  const auto batch = static_cast<int>(pairs.batch);
  const int64_t step = 2 * pairs.s * (n + 1);
  const int64_t product = pairs.r * pairs.s;
  Real* a = l + pairs.first * (n + 1);
  Real* b = a + pairs.s * n;
  Real* c = a + pairs.s * (n + 1);
  WALSH_CUBLAS_RETURN_IF_ERROR(
      GemmBatched(blas, s, r, r, Real{1}, b, ld, step, c, ld, step, scratch, s, product, batch));
  WALSH_CUBLAS_RETURN_IF_ERROR(
      GemmBatched(blas, s, r, s, Real{-1}, a, ld, step, scratch, s, product, b, ld, step, batch));
  return absl::OkStatus();
}

template <typename Real>
absl::Status JoinTriangular(cublasHandle_t blas, int64_t n, const Pairs& pairs, Real* l,
                            Real* scratch) {
  const auto ld = static_cast<int>(n);
  const auto s = static_cast<int>(pairs.s);
  const auto r = static_cast<int>(pairs.r);
  for (int64_t i = 0; i < pairs.batch; ++i) {
    Real* a = l + (pairs.first + i * 2 * pairs.s) * (n + 1);
    Real* b = a + pairs.s * n;
    const Real* c = a + pairs.s * (n + 1);
    WALSH_CUBLAS_RETURN_IF_ERROR(
        Trmm(blas, CUBLAS_SIDE_RIGHT, kOurLower, s, r, Real{1}, c, ld, b, ld, scratch, s));
    WALSH_CUBLAS_RETURN_IF_ERROR(
        Trmm(blas, CUBLAS_SIDE_LEFT, kOurLower, s, r, Real{-1}, a, ld, scratch, s, b, ld));
  }
  return absl::OkStatus();
}

template <typename Real>
absl::Status Join(cublasHandle_t blas, int64_t n, const Pairs& pairs, Real* l, Real* scratch) {
  if (pairs.batch == 0 || pairs.r == 0) return absl::OkStatus();
  if (pairs.s >= kTriangularMin) return JoinTriangular<Real>(blas, n, pairs, l, scratch);
  return JoinByProducts<Real>(blas, n, pairs, l, scratch);
}

}  // namespace

template <typename Real>
absl::Status InvertLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, Real* l) {
  if (n == 0) return absl::OkStatus();
  const dim3 grid(static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>(n));
  ZeroAboveDiagonalBlocks<Real><<<grid, 256, 0, stream>>>(n, l);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("ZeroAboveDiagonalBlocks", stream);
  // A level's results, all of them: r · s where r + s ≤ n, or half of its blocks of s ≤ n/2.
  WALSH_ASSIGN_OR_RETURN(auto scratch, DeviceBuffer<Real>::Allocate(n * n / 4, stream));
  for (int64_t s = kFactorBlock<Real>; s < n; s *= 2) {
    const int64_t n_pairs = n / (2 * s);
    const int64_t rest = n % (2 * s);
    WALSH_RETURN_IF_ERROR(
        Join<Real>(blas, n, {.first = 0, .s = s, .r = s, .batch = n_pairs}, l, scratch.data()));
    WALSH_RETURN_IF_ERROR(Join<Real>(
        blas, n, {.first = n - rest, .s = s, .r = std::max<int64_t>(rest - s, 0), .batch = 1}, l,
        scratch.data()));
  }
  return absl::OkStatus();
}

template absl::Status InvertLower<float>(cublasHandle_t, cudaStream_t, int64_t, float*);
template absl::Status InvertLower<double>(cublasHandle_t, cudaStream_t, int64_t, double*);

}  // namespace walsh::kernels::cuda
