// Upper factor of the inverse Hessian without forming the inverse.
//
// Bound: arithmetic: n³/3 for the Cholesky and n³/3 for the triangular inverse, in fp32.
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/triangular.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kTile = 32;

// out = reverse(H[perm, perm] + diag), of which a triangle is written: element (i, j) comes from
// positions n−1−i, n−1−j.
__global__ void GatherReversed(const float* h, const int32_t* perm, const float* diagonal_add,
                               int64_t n, float* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile;
  if (j >= n || blockIdx.x > blockIdx.y) return;
  const int64_t column = perm[n - 1 - j];
  for (int k = threadIdx.y; k < kTile; k += blockDim.y) {
    const int64_t i = i0 + k;
    if (i >= n) return;
    const int64_t row = perm[n - 1 - i];
    float value = h[row * n + column];
    if (i == j) value += diagonal_add[row];
    out[i * n + j] = value;
  }
}

// Reverses the memory of an n² matrix: with L⁻¹ of the reversed problem this is U, row-major. Sets
// `info` where U is not finite or its diagonal not positive, as the CPU's factor may not be.
__global__ void ReverseAndCheck(float* data, int64_t n, int* info) {
  const int64_t row = blockIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // The middle row of an odd n is its own partner.
  if (column >= (2 * row + 1 == n ? row + 1 : n)) return;
  float& first = data[row * n + column];
  float& second = data[(n - 1 - row) * n + n - 1 - column];
  const float a = first;
  const float b = second;
  first = b;
  second = a;
  const bool is_finite = isfinite(a) && isfinite(b);
  const bool is_positive = a > 0.0f && b > 0.0f;
  if (!is_finite || (row == column && !is_positive)) *info = 1;
}

absl::Status Verdict(const DeviceBuffer<int>& info, cudaStream_t stream) {
  int value = 0;
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(&value, info.data(), sizeof(value), cudaMemcpyDeviceToHost, stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
  if (value == 0) return absl::OkStatus();
  return absl::FailedPreconditionError("not positive definite, or its factor is not finite");
}

}  // namespace

absl::Status FactorHessian(Context& context, const FactorHessianParams& params) {
  const int64_t n = params.dim;
  if (n == 0) return absl::OkStatus();
  const cudaStream_t stream = context.side();
  const cublasHandle_t blas = context.side_blas();
  const auto tiles = static_cast<unsigned>((n + kTile - 1) / kTile);
  GatherReversed<<<dim3(tiles, tiles), dim3(kTile, 8), 0, stream>>>(
      params.h, params.perm, params.diagonal_add, n, params.u);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherReversed", stream);

  WALSH_RETURN_IF_ERROR(FactorLower(blas, stream, n, params.u));
  WALSH_RETURN_IF_ERROR(InvertLower(blas, stream, n, params.u));
  // A factorization that has failed goes through all of that, and shows in the diagonal.
  WALSH_ASSIGN_OR_RETURN(auto info, DeviceBuffer<int>::Allocate(1, stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(info.data(), 0, sizeof(int), stream));
  const dim3 grid(static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>((n + 1) / 2));
  ReverseAndCheck<<<grid, 256, 0, stream>>>(params.u, n, info.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("ReverseAndCheck", stream);
  return Verdict(info, stream);
}

}  // namespace walsh::kernels::cuda
