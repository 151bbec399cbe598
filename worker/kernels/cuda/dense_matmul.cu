#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/alignment.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 8;  // of a CTA: rows
constexpr int kTokens = 4;
constexpr int kAtOnce = kDenseColsMultiple;  // columns of a lane
constexpr int64_t kGridYMax = 65535;

struct Eight {
  float v[kAtOnce];
};
__device__ __forceinline__ Eight ToFloats(uint4 bits) {
  const unsigned words[kAtOnce / 2] = {bits.x, bits.y, bits.z, bits.w};
  Eight eight;
#pragma unroll
  for (int k = 0; k < kAtOnce / 2; ++k) {
    eight.v[2 * k] = __uint_as_float(words[k] << 16);
    eight.v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
  return eight;
}
__device__ __forceinline__ Eight LoadFloats(const float* p) {
  const float4 low = *reinterpret_cast<const float4*>(p);
  const float4 high = *reinterpret_cast<const float4*>(p + 4);
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__global__ void __launch_bounds__(kWarps* kWarpSize)
    DenseMatmulKernel(const DenseMatmulParams p, int64_t y_stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens;
  WaitForPreviousKernel();
  LetNextKernelStart();
  if (row >= p.rows) return;
  float sums[kTokens] = {};
  float squares[kTokens] = {};
  for (int64_t col = lane * kAtOnce; col < p.cols; col += kWarpSize * kAtOnce) {
    const Eight weights = ToFloats(*reinterpret_cast<const uint4*>(p.weights + row * p.cols + col));
    Eight factors = weights;
    if (p.norm_weight != nullptr) {
      const Eight norm = LoadFloats(p.norm_weight + col);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) factors.v[i] *= norm.v[i];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= p.n_tokens) break;
      const int64_t at = (first + t) * p.cols + col;
      const Eight x = p.x_float != nullptr ? LoadFloats(p.x_float + at)
                                           : ToFloats(*reinterpret_cast<const uint4*>(p.x + at));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sums[t] = __fmaf_rn(factors.v[i], x.v[i], sums[t]);
        squares[t] = __fmaf_rn(x.v[i], x.v[i], squares[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (first + t >= p.n_tokens) break;
    float v = WarpReduce<Sum>(sums[t]);
    if (p.has_norm) {
      const float mean = WarpReduce<Sum>(squares[t]) / static_cast<float>(p.cols);
      v *= rsqrtf(mean + p.eps);
    }
    if (lane != 0) continue;
    if (p.bias != nullptr) v += p.bias[row];
    const int64_t at = (first + t) * y_stride + row;
    if (p.y_bf16 != nullptr) {
      p.y_bf16[at] = __float2bfloat16_rn(v);
    } else {
      p.y_float[at] = p.accumulate ? p.y_float[at] + v : v;
    }
  }
}

absl::Status Validate(const DenseMatmulParams& p, int64_t y_stride) {
  if (p.n_tokens < 0 || p.n_tokens > kGridYMax * kTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("DenseMatmul: ", p.n_tokens, " tokens, the limit is ", kGridYMax * kTokens));
  }
  if (p.rows <= 0 || p.cols <= 0 || p.cols % kAtOnce != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("DenseMatmul: ", p.rows, " rows and ", p.cols,
                     " columns; both must be positive, columns a multiple of ", kAtOnce));
  }
  if ((p.x == nullptr) == (p.x_float == nullptr)) {
    return absl::InvalidArgumentError("DenseMatmul: one of x and x_float must be given");
  }
  if ((p.y_float == nullptr) == (p.y_bf16 == nullptr)) {
    return absl::InvalidArgumentError("DenseMatmul: one of y_float and y_bf16 must be given");
  }
  if (p.accumulate && p.y_float == nullptr) {
    return absl::InvalidArgumentError("DenseMatmul: what is added to must be fp32");
  }
  if (y_stride < p.rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "DenseMatmul: stride ", y_stride, " of y, must be at least its columns, ", p.rows));
  }
  return CheckAlignment(
      "DenseMatmul",
      {{"weights", p.weights}, {"x", p.x}, {"x_float", p.x_float}, {"norm_weight", p.norm_weight}});
}

}  // namespace

absl::Status DenseMatmul(const DenseMatmulParams& p) {
  const int64_t y_stride = p.y_stride == 0 ? p.rows : p.y_stride;
  WALSH_RETURN_IF_ERROR(Validate(p, y_stride));
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(PrepareOnce<DenseMatmulKernel>());
  return LaunchKernel("DenseMatmul", DenseMatmulKernel,
                      {.grid = dim3(static_cast<unsigned>((p.rows + kWarps - 1) / kWarps),
                                    static_cast<unsigned>((p.n_tokens + kTokens - 1) / kTokens)),
                       .threads = kWarps * kWarpSize,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      p, y_stride);
}

}  // namespace walsh::kernels::cuda
