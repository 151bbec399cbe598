// TF32 parts of floats, for kernels that write them (worker/kernels/cuda/tf32x3.h).
#pragma once

namespace walsh::kernels::cuda {

// The nearest number of 11 bits, ties away from zero.
__device__ __forceinline__ float RoundToTf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits & ~0x1fffu);  // PTX leaves the other bits open
}

}  // namespace walsh::kernels::cuda
