// Weights as files have them to what the device computes with.
//
// Bound:   memory
// Errors:  INVALID_ARGUMENT sizes that do not fit
// Threads: asynchronous on the given stream
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

enum class ScalarType { kF32, kF16, kBf16 };

// y[i] = x[i] as a float. `first_bad` (device) becomes first + the least i of a value that is not
// finite, where that is less than what it holds: set it to INT64_MAX before, once for all pieces of
// a tensor.
struct ConvertStoredParams {
  int64_t n = 0;
  ScalarType type = ScalarType::kF32;
  const void* x = nullptr;
  float* y = nullptr;
  int64_t first = 0;  // index of x[0] in its tensor
  int64_t* first_bad = nullptr;
  cudaStream_t stream = nullptr;
};
absl::Status ConvertStored(const ConvertStoredParams& params);

// The gptq_v2 tensors of a linear to bf16 [rows, cols], scale · (code − zero) in float and rounded
// once.
struct UnpackParams {
  int64_t rows = 0;
  int64_t cols = 0;
  int bits = 4;
  int64_t group_size = 128;
  const uint32_t* qweight = nullptr;  // [cols / 32 · bits, rows]
  const uint32_t* qzeros = nullptr;   // [groups, rows / 32 · bits]
  const __half* scales = nullptr;     // [groups, rows]
  __nv_bfloat16* y = nullptr;         // [rows, cols]
  cudaStream_t stream = nullptr;
};
absl::Status Unpack(const UnpackParams& params);

}  // namespace walsh::kernels::cuda
