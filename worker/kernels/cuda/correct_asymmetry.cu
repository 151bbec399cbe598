// P = α · triu(D Uᵀ, 1) · U.
//
// Of both products only what stands above the diagonal is needed, and for that a strip of rows
// needs no column before its own first one: a third of the arithmetic of whole products with a
// triangular factor.
//
// cuBLAS is column-major: a row-major matrix is its transpose there, and U lower triangular.
//
// Bound: arithmetic: 2/3 · cols³ flop in fp32, and kStrip · cols² more.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/gptq.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;     // that a CTA's threads take at once
constexpr int64_t kStrip = 512;  // rows: many enough for the full rate

// D in processing order: out[i, j] = cross[perm[j], perm[i]]. A CTA takes a tile through shared
// memory, so that it reads and writes along rows.
__global__ void GatherTransposed(const float* cross, const int32_t* perm, int64_t n, float* out) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t lane = threadIdx.x;
  for (int64_t k = threadIdx.y; k < kTile; k += kTileRows) {
    if (i0 + lane < n && j0 + k < n) tile[k][lane] = cross[perm[j0 + k] * n + perm[i0 + lane]];
  }
  __syncthreads();
  for (int64_t k = threadIdx.y; k < kTile; k += kTileRows) {
    if (i0 + k < n && j0 + lane < n) out[(i0 + k) * n + j0 + lane] = tile[lane][k];
  }
}

// x ← α · triu(x, 1)
__global__ void KeepAboveDiagonal(float alpha, int64_t n, float* x) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile;
  for (int64_t i = i0 + threadIdx.y; i < i0 + kTile; i += kTileRows) {
    if (i < n && j < n) x[i * n + j] = j > i ? alpha * x[i * n + j] : 0.0f;
  }
}

// Row-major out = in · Uᵀ if `transposed`, else in · U, from each strip's first column on, before
// which `in` is not read: there `in` is zero, or what comes of it is not needed.
absl::Status MultiplyStrips(Context& context, bool transposed, int64_t n, const float* u,
                            const float* in, float* out) {
  const float one = 1.0f;
  const auto stride = static_cast<int>(n);
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t at = first * n + first;
    WALSH_CUBLAS_RETURN_IF_ERROR(
        cublasStrmm(context.blas(), CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER,
                    transposed ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                    static_cast<int>(n - first), static_cast<int>(std::min(kStrip, n - first)),
                    &one, u + at, stride, in + at, stride, out + at, stride));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CorrectAsymmetry(Context& context, const CorrectAsymmetryParams& p) {
  if (p.cols < 0) {
    return absl::InvalidArgumentError(absl::StrCat("CorrectAsymmetry: ", p.cols, " columns"));
  }
  if (p.cols == 0) return absl::OkStatus();
  const cudaStream_t stream = context.stream();
  const auto tiles = static_cast<unsigned>((p.cols + kTile - 1) / kTile);
  const dim3 grid(tiles, tiles);
  const dim3 threads(kTile, kTileRows);
  GatherTransposed<<<grid, threads, 0, stream>>>(p.cross, p.perm, p.cols, p.correction);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherTransposed", stream);
  WALSH_RETURN_IF_ERROR(MultiplyStrips(context, true, p.cols, p.u, p.correction, p.cross));
  KeepAboveDiagonal<<<grid, threads, 0, stream>>>(static_cast<float>(p.alpha), p.cols, p.cross);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("KeepAboveDiagonal", stream);
  return MultiplyStrips(context, false, p.cols, p.u, p.cross, p.correction);
}

}  // namespace walsh::kernels::cuda
