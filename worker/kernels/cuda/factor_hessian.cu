// Upper factor of the inverse Hessian without forming the inverse.
//
// In fp32 the factor takes shape where U is wanted; in double beside it, and is rounded at the end.
//
// Bound: arithmetic: n³/3 for the Cholesky and n³/3 for the triangular inverse.
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
template <typename Real>
__global__ void GatherReversed(const float* h, const int32_t* perm, const float* diagonal_add,
                               int64_t n, Real* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kTile;
  if (j >= n || blockIdx.x > blockIdx.y) return;
  const int64_t column = perm[n - 1 - j];
  for (int k = threadIdx.y; k < kTile; k += blockDim.y) {
    const int64_t i = i0 + k;
    if (i >= n) return;
    const int64_t row = perm[n - 1 - i];
    Real value = h[row * n + column];
    if (i == j) value += static_cast<Real>(diagonal_add[row]);
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

// out = a reversed, both [n, n], with the same verdict. What float takes for infinite, or for a
// diagonal of zero, is refused as well.
__global__ void RoundReversedAndCheck(const double* a, int64_t n, float* out, int* info) {
  const int64_t row = blockIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= n) return;
  const auto value = static_cast<float>(a[(n - 1 - row) * n + n - 1 - column]);
  out[row * n + column] = value;
  if (!isfinite(value) || (row == column && !(value > 0.0f))) *info = 1;
}

absl::Status Verdict(const DeviceBuffer<int>& info, cudaStream_t stream) {
  int value = 0;
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(&value, info.data(), sizeof(value), cudaMemcpyDeviceToHost, stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
  if (value == 0) return absl::OkStatus();
  return absl::FailedPreconditionError("not positive definite, or its factor is not finite");
}

// reverse(L⁻¹ …) in `a`: all of FactorHessian but for the reversal of what it leaves.
template <typename Real>
absl::Status InverseFactorReversed(Context& context, const FactorHessianParams& params, Real* a) {
  const int64_t n = params.dim;
  const cudaStream_t stream = context.side();
  const auto tiles = static_cast<unsigned>((n + kTile - 1) / kTile);
  GatherReversed<Real><<<dim3(tiles, tiles), dim3(kTile, 8), 0, stream>>>(
      params.h, params.perm, params.diagonal_add, n, a);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherReversed", stream);
  WALSH_RETURN_IF_ERROR(FactorLower<Real>(context.side_blas(), stream, n, a));
  return InvertLower<Real>(context.side_blas(), stream, n, a);
}

absl::Status FactorInFloat(Context& context, const FactorHessianParams& params, int* info) {
  const int64_t n = params.dim;
  WALSH_RETURN_IF_ERROR(InverseFactorReversed<float>(context, params, params.u));
  const dim3 grid(static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>((n + 1) / 2));
  ReverseAndCheck<<<grid, 256, 0, context.side()>>>(params.u, n, info);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("ReverseAndCheck", context.side());
  return absl::OkStatus();
}

absl::Status FactorInDouble(Context& context, const FactorHessianParams& params, int* info) {
  const int64_t n = params.dim;
  WALSH_ASSIGN_OR_RETURN(auto a, DeviceBuffer<double>::Allocate(n * n, context.side()));
  WALSH_RETURN_IF_ERROR(InverseFactorReversed<double>(context, params, a.data()));
  const dim3 grid(static_cast<unsigned>((n + 255) / 256), static_cast<unsigned>(n));
  RoundReversedAndCheck<<<grid, 256, 0, context.side()>>>(a.data(), n, params.u, info);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("RoundReversedAndCheck", context.side());
  return absl::OkStatus();
}

}  // namespace

absl::Status FactorHessian(Context& context, const FactorHessianParams& params) {
  if (params.dim == 0) return absl::OkStatus();
  const cudaStream_t stream = context.side();
  // A factorization that has failed goes through all of its steps, and shows in the factor.
  WALSH_ASSIGN_OR_RETURN(auto info, DeviceBuffer<int>::Allocate(1, stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(info.data(), 0, sizeof(int), stream));
  WALSH_RETURN_IF_ERROR(params.in_double ? FactorInDouble(context, params, info.data())
                                         : FactorInFloat(context, params, info.data()));
  return Verdict(info, stream);
}

}  // namespace walsh::kernels::cuda
