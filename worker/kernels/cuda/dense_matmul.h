// Products of rows with a matrix of bf16, for the few linears that an artifact leaves unquantized:
// what LowBitMatmul does (worker/kernels/cuda/low_bit_matmul.h), RMSNorm, bias and residual add
// inside, with weights as they are. Sums are in fp32.
//
// A warp has a row of the matrix and four tokens. A row of the result depends on its own token
// only: it has the same bits alone and among any others, since sums have one order.
//
// Bound:   memory: the weights are read once for four tokens, and from the L2 for the others
// Shapes:  row-major, rows of x and y are tokens
// Errors:  INVALID_ARGUMENT  sizes or alignments that do not fit, named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

// A lane reads 16 bytes of bf16 at once.
inline constexpr int64_t kDenseColsMultiple = 8;

struct DenseMatmulParams {
  int64_t n_tokens = 0;
  int64_t rows = 0;  // outputs
  int64_t cols = 0;  // a multiple of kDenseColsMultiple
  const __nv_bfloat16* weights =
      nullptr;  // [rows, cols], aligned to 16 bytes like x and the norm's
  // One of the two, [n_tokens, cols].
  const __nv_bfloat16* x = nullptr;
  const float* x_float = nullptr;
  // RMSNorm first: W (norm_weight * x) / sqrt(mean(x^2) + eps).
  bool has_norm = false;
  const float* norm_weight = nullptr;  // [cols], or null: ones
  float eps = 0;
  const float* bias = nullptr;  // [rows], or null
  bool accumulate = false;      // y += the product; fp32 only
  // One of the two, [n_tokens, rows].
  float* y_float = nullptr;
  __nv_bfloat16* y_bf16 = nullptr;
  int64_t y_stride = 0;  // 0: rows
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
absl::Status DenseMatmul(const DenseMatmulParams& params);

}  // namespace walsh::kernels::cuda
