// Scale and zero point of a group of weights, with the clip search: one warp per group.
//
// The range shrinks to p·[min(x, 0), max(x, 0)], p ∈ {1, 0.99, …, 0.21}, and the p with the least
// Σ |x − dequantized|^2.4 wins; scales are rounded to half precision before the errors are taken.
// The arithmetic is that of worker/gptq/tile.cc, so that CPU and GPU choose the same grids but for
// ties.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {

inline constexpr int kClipSteps = 80;
inline constexpr float kClipGrid = 100.0f;
inline constexpr float kClipNorm = 2.4f;
// Half precision's largest value and smallest subnormal.
inline constexpr float kScaleMax = 65504.0f;
inline constexpr float kScaleMin = 5.9604644775390625e-8f;

struct GroupGrid {
  float scale;
  float inverse_scale;
  float zero;
};

// `low` ≤ 0 ≤ `high`; for symmetric grids low = −high.
__device__ __forceinline__ GroupGrid GridOfRange(float low, float high, float shrink,
                                                 float max_code, bool symmetric) {
  GroupGrid grid;
  const float unit = (high - low) / max_code;
  const float rounded = __half2float(__float2half_rn(fminf(unit * shrink, kScaleMax)));
  grid.scale = fmaxf(rounded, kScaleMin);
  grid.inverse_scale = 1.0f / grid.scale;
  grid.zero = symmetric ? (max_code + 1.0f) * 0.5f
                        : fminf(fmaxf(rintf(-(low * shrink * grid.inverse_scale)), 0.0f), max_code);
  return grid;
}

__device__ __forceinline__ float PowClipNorm(float x) { return exp2f(kClipNorm * __log2f(x)); }

// |x / scale − code|^2.4: an error in units of this grid's scale.
__device__ __forceinline__ float ScaledError(float w, const GroupGrid& grid, float max_code) {
  const float x = w * grid.inverse_scale;
  const float code = fminf(fmaxf(rintf(x), -grid.zero), max_code - grid.zero);
  return PowClipNorm(fabsf(x - code));
}

__device__ __forceinline__ float QuantizeToCode(float w, const GroupGrid& grid, float max_code) {
  return fminf(fmaxf(rintf(w / grid.scale) + grid.zero, 0.0f), max_code);
}
__device__ __forceinline__ float DequantizeCode(float code, const GroupGrid& grid) {
  return grid.scale * (code - grid.zero);
}

// The best grid of a group whose extremes are known. `sum_errors(grid)` gives Σ ScaledError over
// the group to every thread that calls.
template <typename SumErrors>
__device__ __forceinline__ GroupGrid SearchGrid(float low, float high, float max_code,
                                                bool symmetric, bool mse_clip,
                                                SumErrors&& sum_errors) {
  if (symmetric) {
    high = fmaxf(-low, high);
    low = -high;
  }
  GroupGrid best = GridOfRange(low, high, 1.0f, max_code, symmetric);
  if (low == high) {  // a group of zeros: any scale will do
    best.scale = 1.0f;
    best.inverse_scale = 1.0f;
    return best;
  }
  if (!mse_clip) return best;
  const float first_inverse = best.inverse_scale;
  float best_error = sum_errors(best);
  for (int step = 1; step < kClipSteps; ++step) {
    const float shrink = 1.0f - static_cast<float>(step) / kClipGrid;
    const GroupGrid grid = GridOfRange(low, high, shrink, max_code, symmetric);
    // Compared in units of the first grid's scale.
    const float error = sum_errors(grid) * PowClipNorm(grid.scale * first_inverse);
    if (error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

// `values` holds the lane's share of the group; all lanes return the same grid.
template <int kPerLane>
__device__ GroupGrid WarpGroupGrid(const float* values, float max_code, bool symmetric,
                                   bool mse_clip) {
  float low = 0.0f;
  float high = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    low = fminf(low, values[k]);
    high = fmaxf(high, values[k]);
  }
  low = WarpReduce<Min>(low);
  high = WarpReduce<Max>(high);
  return SearchGrid(low, high, max_code, symmetric, mse_clip, [&](const GroupGrid& grid) {
    float error = 0.0f;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) error += ScaledError(values[k], grid, max_code);
    return WarpReduce<Sum>(error);
  });
}

}  // namespace walsh::kernels::cuda
