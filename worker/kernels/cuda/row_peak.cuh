// The largest logit of a row, the first of equal ones, as the maximum of one integer: the order in
// which threads come does not matter to it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace walsh::kernels::cuda {

// Orders as the values do; −0 is +0. The value is no NaN.
__device__ __forceinline__ unsigned OrderedBits(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 != 0 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float ValueOfOrderedBits(unsigned ordered) {
  return __uint_as_float(ordered ^ (ordered >> 31 != 0 ? 0x80000000u : ~0u));
}

// Orders by value, then by lower position. Above all of them: there is a NaN. Below: there is none.
using PeakKey = unsigned long long;
inline constexpr PeakKey kNaNPeak = ~0ull;
inline constexpr PeakKey kNoPeak = 0;

__device__ __forceinline__ PeakKey PeakKeyOf(float value, unsigned position) {
  return static_cast<PeakKey>(OrderedBits(value)) << 32 | ~position;
}
__device__ __forceinline__ float PeakValue(PeakKey key) {
  return ValueOfOrderedBits(static_cast<unsigned>(key >> 32));
}
// −1 where there is none, or a NaN.
__device__ __forceinline__ int32_t PeakPosition(PeakKey key) {
  return key == kNoPeak || key == kNaNPeak ? -1 : static_cast<int32_t>(~static_cast<unsigned>(key));
}

// The first largest of what one thread has seen, in the order of positions; none is above −infinity
// at first.
struct Peak {
  float value = -INFINITY;
  unsigned position = 0;
  bool has_nan = false;

  __device__ __forceinline__ void See(float x, int64_t at) {
    has_nan |= isnan(x);
    if (x > value) {
      value = x;
      position = static_cast<unsigned>(at);
    }
  }
  __device__ __forceinline__ PeakKey Key() const {
    if (has_nan) return kNaNPeak;
    return value == -INFINITY ? kNoPeak : PeakKeyOf(value, position);
  }
};

}  // namespace walsh::kernels::cuda
