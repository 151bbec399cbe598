// QkvTransform (qkv_transform.h) of one head, by a warp. A lane holds pairs of neighbours in either
// half of the head, so that what is rotated together is in one lane. Products and sums are rounded
// where they stand, whatever is inlined around them: a head has the same bits in every kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {

// Pairs of a lane in half a head.
constexpr int HeadPairsOf(int head_dim) {
  constexpr int kElementsOfWarp = 4 * kWarpSize;
  return (head_dim + kElementsOfWarp - 1) / kElementsOfWarp;
}

template <int kPairs>
struct HeadPairs {
  float2 low[kPairs];
  float2 high[kPairs];
};
template <int kPairs>
struct HeadRotation {
  float2 sine[kPairs];
  float2 cosine[kPairs];
};

// Calls at(i, element) for this lane's pairs of a half of `half` elements.
template <int kPairs, typename At>
__device__ __forceinline__ void ForHeadPairs(int half, const At& at) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int element = (i * kWarpSize + lane) * 2;
    if (element < half) at(i, element);
  }
}

__device__ __forceinline__ float2 LoadPair(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}
__device__ __forceinline__ float2 LoadPair(const __nv_bfloat16* x) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}
__device__ __forceinline__ void StorePair(__nv_bfloat16* y, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(y) = __floats2bfloat162_rn(x.x, x.y);
}

// Zeros where a lane has no elements.
template <int kPairs, typename In>
__device__ __forceinline__ HeadPairs<kPairs> LoadHead(const In* x, int half) {
  HeadPairs<kPairs> head{};
  ForHeadPairs<kPairs>(half, [&](int i, int at) {
    head.low[i] = LoadPair(x + at);
    head.high[i] = LoadPair(x + half + at);
  });
  return head;
}

template <int kPairs>
__device__ __forceinline__ void StoreHead(__nv_bfloat16* y, const HeadPairs<kPairs>& head,
                                          int half) {
  ForHeadPairs<kPairs>(half, [&](int i, int at) {
    StorePair(y + at, head.low[i]);
    StorePair(y + half + at, head.high[i]);
  });
}

template <int kPairs>
__device__ __forceinline__ void AddBias(HeadPairs<kPairs>& head, const HeadPairs<kPairs>& bias) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    head.low[i] = {__fadd_rn(head.low[i].x, bias.low[i].x),
                   __fadd_rn(head.low[i].y, bias.low[i].y)};
    head.high[i] = {__fadd_rn(head.high[i].x, bias.high[i].x),
                    __fadd_rn(head.high[i].y, bias.high[i].y)};
  }
}

template <int kPairs>
__device__ __forceinline__ void NormalizeHead(HeadPairs<kPairs>& head,
                                              const HeadPairs<kPairs>& norm, int head_dim,
                                              float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    sum = fmaf(head.low[i].x, head.low[i].x, sum);
    sum = fmaf(head.low[i].y, head.low[i].y, sum);
    sum = fmaf(head.high[i].x, head.high[i].x, sum);
    sum = fmaf(head.high[i].y, head.high[i].y, sum);
  }
  sum = WarpReduce<Sum>(sum);
  const float mean = __fdiv_rn(sum, static_cast<float>(head_dim));
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
  const auto scaled = [&](float x, float weight) { return __fmul_rn(__fmul_rn(x, scale), weight); };
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    head.low[i] = {scaled(head.low[i].x, norm.low[i].x), scaled(head.low[i].y, norm.low[i].y)};
    head.high[i] = {scaled(head.high[i].x, norm.high[i].x), scaled(head.high[i].y, norm.high[i].y)};
  }
}

template <int kPairs>
__device__ __forceinline__ HeadRotation<kPairs> RotationAt(int position,
                                                           const float* inverse_frequencies,
                                                           int half) {
  constexpr double kHalfTurnsPerRadian = 0.31830988618379067154;  // 1 / π
  HeadRotation<kPairs> rotation{};
  const auto angle = [&](float inverse_frequency, float* sine, float* cosine) {
    const double half_turns =
        __dmul_rn(__dmul_rn(static_cast<double>(position), static_cast<double>(inverse_frequency)),
                  kHalfTurnsPerRadian);
    sincospif(static_cast<float>(half_turns - 2.0 * rint(half_turns / 2.0)), sine, cosine);
  };
  ForHeadPairs<kPairs>(half, [&](int i, int at) {
    const float2 frequencies = LoadPair(inverse_frequencies + at);
    angle(frequencies.x, &rotation.sine[i].x, &rotation.cosine[i].x);
    angle(frequencies.y, &rotation.sine[i].y, &rotation.cosine[i].y);
  });
  return rotation;
}

template <int kPairs>
__device__ __forceinline__ void RotateHead(HeadPairs<kPairs>& head,
                                           const HeadRotation<kPairs>& rotation) {
  const auto rotate = [](float& a, float& b, float sine, float cosine) {
    const float first = a;
    const float second = b;
    a = fmaf(first, cosine, -__fmul_rn(second, sine));
    b = fmaf(second, cosine, __fmul_rn(first, sine));
  };
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    rotate(head.low[i].x, head.high[i].x, rotation.sine[i].x, rotation.cosine[i].x);
    rotate(head.low[i].y, head.high[i].y, rotation.sine[i].y, rotation.cosine[i].y);
  }
}

}  // namespace walsh::kernels::cuda
