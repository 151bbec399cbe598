// Reductions over a warp or a block. All threads of the named group must call; all get the result.
// The order is fixed, so results repeat bit for bit.
#pragma once

#include <cuda_runtime.h>

namespace walsh::kernels::cuda {

inline constexpr int kWarpSize = 32;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

template <typename Op, typename T>
__device__ __forceinline__ T WarpReduce(T x, Op op = Op()) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = op(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

// `scratch` has room for one T a warp; it may be reused after the call.
template <typename Op, typename T>
__device__ __forceinline__ T BlockReduce(T x, T* scratch, Op op = Op()) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int n_warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = WarpReduce<Op>(x, op);
  if (threadIdx.x % kWarpSize == 0) scratch[warp] = x;
  __syncthreads();
  T result = scratch[0];
  for (int i = 1; i < n_warps; ++i) result = op(result, scratch[i]);
  __syncthreads();
  return result;
}

}  // namespace walsh::kernels::cuda
