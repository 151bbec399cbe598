// fp32 products on the tensor cores: 3×TF32.
//
// A float is the sum of two numbers of TF32's 11 bits, up to about 2⁻²³ of it. With a = a₁ + a₂ and
// b = b₁ + b₂ the product is a₁b₁ + a₁b₂ + a₂b₁, and what is left out, a₂b₂, is below 2⁻²² of it:
// as good as fp32 to within a factor of two or three (tests/gpu/tf32x3_gpu_test.cc), at a third of
// the TF32 rate, which on a Hopper GPU is more than twice that of fp32.
//
// Source:  Ootomo and Yokota 2022 (arXiv 2203.03341)
// Shapes:  row-major
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {

// x ≈ high + low, elementwise; `high` may be `x`. On the context's stream.
absl::Status SplitTf32(Context& context, int64_t n, const float* x, float* high, float* low);

// y[n, out] = x[n, in] · W[out, in]ᵀ, of what SplitTf32 made of both.
struct GemmTf32x3Params {
  int64_t n_tokens = 0;
  int64_t in = 0;
  int64_t out = 0;
  const float* x_high = nullptr;
  const float* x_low = nullptr;
  const float* weights_high = nullptr;
  const float* weights_low = nullptr;
  float* y = nullptr;
};
absl::Status GemmTf32x3(Context& context, const GemmTf32x3Params& params);

}  // namespace walsh::kernels::cuda
