// What gates the units of a feed-forward layer, in fp32.
#pragma once

#include <cuda_runtime.h>

namespace walsh::kernels::cuda {

__device__ __forceinline__ float Silu(float v) { return v / (1.0f + expf(-v)); }
// By its tanh formula: (1 + tanh(z)) / 2 is the logistic function of 2 z with
// z = sqrt(2 / π) · (v + 0.044715 v³).
__device__ __forceinline__ float Gelu(float v) {
  const float twice_z = 1.5957691216f * __fmaf_rn(0.044715f * v * v, v, v);
  return v / (1.0f + expf(-twice_z));
}

}  // namespace walsh::kernels::cuda
