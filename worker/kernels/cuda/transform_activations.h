// What LowBitMatmul does to its activations on the way, for products that are not its own: columns
// in another order, then blocks of them times the orthonormal Hadamard matrix in natural order.
//
//   y[n, c] = x[n, input_order[c]],  then y ← y · diag(H, H, …)
//
// Computed in fp32 and rounded to bf16 once.
//
// Bound:   memory: each element is read and written once
// Shapes:  row-major, rows of x and y are tokens
// Errors:  INVALID_ARGUMENT  sizes or alignments that do not fit, named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

struct TransformActivationsParams {
  int64_t n_tokens = 0;
  int64_t cols = 0;                      // a multiple of 8
  const __nv_bfloat16* x = nullptr;      // [n_tokens, cols], aligned to 16 bytes
  const int32_t* input_order = nullptr;  // [cols], aligned to 16 bytes; null: as they are
  int64_t rotation_block = 0;            // as IsLowBitRotation says; 0: none
  // [n_tokens, cols], aligned to 16 bytes; x itself where the order stays.
  __nv_bfloat16* y = nullptr;
  cudaStream_t stream = nullptr;
};
absl::Status TransformActivations(const TransformActivationsParams& params);

}  // namespace walsh::kernels::cuda
