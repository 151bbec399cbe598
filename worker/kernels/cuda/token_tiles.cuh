// Where a number of TokenTiles lies (worker/kernels/cuda/token_tiles.h), for kernels.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "worker/kernels/cuda/wgmma.cuh"

namespace walsh::kernels::cuda {

inline constexpr int kTilePieceCols = 64;

// Writes columns `col` to col + 3 of a token, col a multiple of 4.
__device__ __forceinline__ void StoreFour(__nv_bfloat16* tiles, int64_t capacity, int64_t token,
                                          int64_t col, float4 v) {
  const int64_t row = col / kTilePieceCols * capacity + token;
  const auto quad = static_cast<unsigned>(col % kTilePieceCols) / 4;
  const auto swizzle = static_cast<unsigned>(token % 8);
  auto* const to = reinterpret_cast<char*>(tiles) + row * kWgmmaRowBytes + quad % 4 * 4;
  const unsigned even = quad / 4 * 2;
  *reinterpret_cast<__nv_bfloat162*>(to + (even ^ swizzle) * 16) = __floats2bfloat162_rn(v.x, v.z);
  *reinterpret_cast<__nv_bfloat162*>(to + ((even + 1) ^ swizzle) * 16) =
      __floats2bfloat162_rn(v.y, v.w);
}

}  // namespace walsh::kernels::cuda
