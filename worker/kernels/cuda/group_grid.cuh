// Scale and zero point of a group of weights, with the clip search: 16 lanes per group.
//
// The range shrinks to p·[min(x, 0), max(x, 0)], p ∈ {1, 0.99, …, 0.21}, and the p with the least
// Σ |x − dequantized|^2.4 wins, the first one of several; scales are rounded to half precision
// before the errors are taken. Codes are those of worker/gptq/tile.cc bit for bit and the power is
// good to 1e-6, so that CPU and GPU choose the same grids but for ties.
//
// Lanes are steps and not weights: a lane reads every weight of the group and sums the errors of
// its own grid, so that nothing is reduced before the least of 80 sums is looked for.
//
// Bound: special functions, two for each of 80 steps and each weight.
#pragma once

#include <cuda_fp16.h>

#include <cmath>

#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {

inline constexpr int kClipSteps = 80;
inline constexpr float kClipGrid = 100.0f;
inline constexpr float kClipNorm = 2.4f;
inline constexpr int kClipLanes = 16;
inline constexpr int kClipRounds = kClipSteps / kClipLanes;
static_assert(kClipRounds * kClipLanes == kClipSteps, "every lane has a step in every round");
// Weights between two questions whether a round can still win.
inline constexpr int kClipChunk = 16;
// Half precision's largest value and smallest subnormal.
inline constexpr float kScaleMax = 65504.0f;
inline constexpr float kScaleMin = 5.9604644775390625e-8f;
// x + kRounding is kRounding + rint(x) for |x| < 2^22, and beyond that still on the same side of
// every code: one addition where rint is a special function.
inline constexpr float kRounding = 12582912.0f;  // 1.5 · 2^23

struct GroupGrid {
  float scale;
  float inverse_scale;
  float zero;
};

// x^2.4 for x ≥ 0; below 2^-126 both x and the result count as 0.
__device__ __forceinline__ float PowClipNorm(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(kClipNorm * y));
  return y;
}

__device__ __forceinline__ float QuantizeToCode(float w, const GroupGrid& grid, float max_code) {
  return fminf(fmaxf(rintf(w / grid.scale) + grid.zero, 0.0f), max_code);
}

// The grids that a group chooses from.
class ClipSearch {
 public:
  // `low` ≤ 0 ≤ `high`.
  __device__ ClipSearch(float low, float high, float max_code, bool symmetric)
      : max_code_(max_code), symmetric_(symmetric) {
    high_ = symmetric ? fmaxf(-low, high) : high;
    low_ = symmetric ? -high_ : low;
    unit_ = (high_ - low_) / max_code;
    first_inverse_ = Grid(0).inverse_scale;
  }

  __device__ GroupGrid Grid(int step) const {
    const float shrink = 1.0f - static_cast<float>(step) / kClipGrid;
    const float rounded = __half2float(__float2half_rn(fminf(unit_ * shrink, kScaleMax)));
    GroupGrid grid;
    grid.scale = fmaxf(rounded, kScaleMin);
    grid.inverse_scale = 1.0f / grid.scale;
    grid.zero = symmetric_
                    ? (max_code_ + 1.0f) * 0.5f
                    : fminf(fmaxf(rintf(-(low_ * shrink * grid.inverse_scale)), 0.0f), max_code_);
    return grid;
  }
  // That of the search's winner.
  __device__ GroupGrid Chosen(int step) const {
    GroupGrid grid = Grid(step);
    if (low_ == high_) {  // a group of zeros: any scale will do
      grid.scale = 1.0f;
      grid.inverse_scale = 1.0f;
    }
    return grid;
  }

  // sum + Σ |x / scale − code|^2.4 over kValues adjacent values, in their order.
  template <int kValues>
  __device__ __forceinline__ float AddErrors(const float* values, const GroupGrid& grid,
                                             float sum) const {
    static_assert(kValues % 4 == 0, "values are read by four");
    const float first_code = kRounding - grid.zero;
    const float last_code = first_code + max_code_;
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(values + i);
      const float each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (const float value : each) {
        // Not fused with what follows: tile.cc rounds the product, too.
        const float x = __fmul_rn(value, grid.inverse_scale);
        const float code = fminf(fmaxf(x + kRounding, first_code), last_code) - kRounding;
        sum += PowClipNorm(fabsf(x - code));
      }
    }
    return sum;
  }
  // Such sums are in units of their grid's scale; times this they are in units of the first's.
  __device__ float ErrorUnit(const GroupGrid& grid) const {
    return PowClipNorm(grid.scale * first_inverse_);
  }

 private:
  float low_;
  float high_;
  float unit_;  // the scale of the whole range
  float first_inverse_;
  float max_code_;
  bool symmetric_;
};

struct ClipChoice {
  float error = INFINITY;
  int step = 0;
};

// The least error and of equal ones the first step's, over groups of kLanes lanes.
template <int kLanes>
__device__ __forceinline__ ClipChoice BestChoice(ClipChoice best) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const float error = __shfl_xor_sync(~0u, best.error, offset);
    const int step = __shfl_xor_sync(~0u, best.step, offset);
    if (error < best.error || (error == best.error && step < best.step)) best = {error, step};
  }
  return best;
}

// The grid of `n` values, a multiple of 32, aligned to 16 bytes. Called by whole warps: each half
// of a warp, of 16 lanes, has a group of its own and gets its grid in all of them.
__device__ __forceinline__ GroupGrid HalfWarpGrid(int lane, const float* values, int n,
                                                  float max_code, bool symmetric, bool mse_clip) {
  float low = 0.0f;
  float high = 0.0f;
#pragma unroll 1
  for (int i = 4 * lane; i < n; i += 4 * kClipLanes) {
    const float4 four = *reinterpret_cast<const float4*>(values + i);
    low = fminf(fminf(fminf(four.x, four.y), fminf(four.z, four.w)), low);
    high = fmaxf(fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)), high);
  }
#pragma unroll
  for (int offset = kClipLanes / 2; offset > 0; offset /= 2) {
    low = fminf(low, __shfl_xor_sync(~0u, low, offset));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, offset));
  }
  const ClipSearch search(low, high, max_code, symmetric);
  if (!mse_clip) return search.Chosen(0);

  ClipChoice best;         // of this lane's steps
  float least = INFINITY;  // of the whole group's so far
#pragma unroll 1
  for (int round = 0; round < kClipRounds; ++round) {
    const int step = round * kClipLanes + lane;
    const GroupGrid grid = search.Grid(step);
    const float unit = search.ErrorUnit(grid);
    float error = 0.0f;
#pragma unroll 1
    for (int i = 0; i < n; i += kClipChunk) {
      error = search.AddErrors<kClipChunk>(values + i, grid, error);
      // Sums only grow: a round is over when all its steps have lost. This changes no result.
      if (__all_sync(~0u, !(error * unit <= least))) break;
    }
    error *= unit;
    if (error < best.error) best = {error, step};
    least = fminf(least, error);
#pragma unroll
    for (int offset = kClipLanes / 2; offset > 0; offset /= 2) {
      least = fminf(least, __shfl_xor_sync(~0u, least, offset));
    }
  }
  return search.Chosen(BestChoice<kClipLanes>(best).step);
}

}  // namespace walsh::kernels::cuda
