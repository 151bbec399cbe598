// The block Walsh–Hadamard transform, in place, by warps.
//
// A lane holds two quads of four consecutive floats, so that two 16-byte loads are in flight before
// the first use. A block of up to 128 floats is one quad of each of its lanes, and the second quad
// belongs to another block; a block of 256 takes both quads of all 32 lanes. Bits of the element's
// index live in three places: 0 and 1 inside a quad, the next in the lane, bit 7 (block 256) in the
// quad's number. Each bit is one butterfly: in registers, or by a shuffle.
//
// That gives natural (Hadamard) order. Sequency order moves natural row n to s, where
// n = bitreverse(s ^ (s >> 1)); hence s is the Gray decoding of bitreverse(n). The move goes
// through shared memory: for a fixed place in the quad, lane → s mod 32 is one-to-one for block
// 128, so the scattered writes meet no bank conflict there, and smaller blocks are padded apart to
// the same end.
//
// Layout:  blocks of kBlock floats at x + row · x_stride + column
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace walsh::kernels::cuda {

constexpr int kWarpLanes = 32;
constexpr int kWarpsPerCta = 8;
constexpr int kQuadsPerLane = 2;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <int kBlock>
struct BlockWalshLayout {
  static_assert(kBlock >= 16 && kBlock <= 256 && (kBlock & (kBlock - 1)) == 0,
                "a block is 4 to 64 quads of one warp");
  static constexpr int kLog2Block = 31 - __builtin_clz(kBlock);
  static constexpr int kQuadsPerBlock = kBlock <= 4 * kWarpLanes ? 1 : 2;  // in each of its lanes
  static constexpr int kLanesPerBlock = kBlock / (4 * kQuadsPerBlock);
  static constexpr int kBlocksPerRow = kWarpLanes / kLanesPerBlock;  // side by side in a warp
  static constexpr int kBlocksPerWarp = kBlocksPerRow * kQuadsPerLane / kQuadsPerBlock;
  // Blocks side by side would meet in the same banks; a multiple of 4 keeps quads aligned.
  static constexpr int kPadding = kBlocksPerRow > 1 ? kLanesPerBlock : 0;
  static constexpr int kSharedFloats = kBlocksPerWarp * (kBlock + kPadding);
  static_assert(kPadding % 4 == 0 && kBlock % 4 == 0, "quads in shared memory are 16-byte aligned");
};

struct BlockWalshArguments {
  float* x;
  int64_t x_stride;
  int64_t n_row_blocks;  // blocks in a row
  int64_t n_blocks;      // in all
};

__device__ __forceinline__ void Butterfly(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// Index bits 0 and 1.
__device__ __forceinline__ void ThreadButterflies(float4& q) {
  Butterfly(q.x, q.y);
  Butterfly(q.z, q.w);
  Butterfly(q.x, q.z);
  Butterfly(q.y, q.w);
}

__device__ __forceinline__ float ShuffleButterfly(float value, int mask, bool is_upper) {
  const float other = __shfl_xor_sync(kFullWarp, value, mask);
  return is_upper ? other - value : value + other;
}

// The index bits that the lane holds.
template <int kLanesPerBlock>
__device__ __forceinline__ void WarpButterflies(float4& q, int lane) {
#pragma unroll
  for (int mask = 1; mask < kLanesPerBlock; mask *= 2) {
    const bool is_upper = (lane & mask) != 0;
    q.x = ShuffleButterfly(q.x, mask, is_upper);
    q.y = ShuffleButterfly(q.y, mask, is_upper);
    q.z = ShuffleButterfly(q.z, mask, is_upper);
    q.w = ShuffleButterfly(q.w, mask, is_upper);
  }
}

// Where natural row n of a matrix of order 2^log2_order, at most 256, stands in sequency order.
__device__ __forceinline__ int SequencyIndex(int n, int log2_order) {
  unsigned s = __brev(static_cast<unsigned>(n)) >> (32 - log2_order);
  s ^= s >> 1;
  s ^= s >> 2;
  s ^= s >> 4;
  return static_cast<int>(s);
}

template <bool kAligned>
__device__ __forceinline__ float4 LoadQuad(const float* p) {
  if constexpr (kAligned) return *reinterpret_cast<const float4*>(p);
  return make_float4(p[0], p[1], p[2], p[3]);
}

template <bool kAligned>
__device__ __forceinline__ void StoreQuad(float* p, const float4& q) {
  if constexpr (kAligned) {
    *reinterpret_cast<float4*>(p) = q;
  } else {
    p[0] = q.x;
    p[1] = q.y;
    p[2] = q.z;
    p[3] = q.w;
  }
}

// kAligned: every quad of x is 16-byte aligned. Grid-stride over groups of blocks, one per warp.
template <int kBlock, bool kSequency, bool kAligned>
__global__ void __launch_bounds__(kWarpLanes* kWarpsPerCta)
    BlockWalshKernel(const BlockWalshArguments arguments) {
  using Layout = BlockWalshLayout<kBlock>;
  __shared__ __align__(16) float shared[kSequency ? kWarpsPerCta * Layout::kSharedFloats : 1];
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  const int block_lane = lane % Layout::kLanesPerBlock;
  const int warp_block = lane / Layout::kLanesPerBlock;
  const float scale = rsqrtf(static_cast<float>(kBlock));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerCta * Layout::kBlocksPerWarp;

  for (int64_t first =
           (static_cast<int64_t>(blockIdx.x) * kWarpsPerCta + warp) * Layout::kBlocksPerWarp;
       first < arguments.n_blocks; first += stride) {
    float4 quads[kQuadsPerLane];
    float* addresses[kQuadsPerLane];
    int in_warp[kQuadsPerLane];   // which of the warp's blocks
    int in_block[kQuadsPerLane];  // natural index of the quad's first element
#pragma unroll
    for (int k = 0; k < kQuadsPerLane; ++k) {
      in_warp[k] = warp_block + (Layout::kQuadsPerBlock == 1 ? k * Layout::kBlocksPerRow : 0);
      in_block[k] = 4 * block_lane + (Layout::kQuadsPerBlock == 1 ? 0 : k * kBlock / 2);
      const int64_t index = first + in_warp[k];
      // One row is the common case (contiguous matrices are flattened), and a division is dear.
      const int64_t row =
          arguments.n_row_blocks == arguments.n_blocks ? 0 : index / arguments.n_row_blocks;
      const int64_t column = (index - row * arguments.n_row_blocks) * kBlock + in_block[k];
      addresses[k] =
          index < arguments.n_blocks ? arguments.x + row * arguments.x_stride + column : nullptr;
      quads[k] = addresses[k] != nullptr ? LoadQuad<kAligned>(addresses[k]) : float4{};
    }
#pragma unroll
    for (int k = 0; k < kQuadsPerLane; ++k) {
      ThreadButterflies(quads[k]);
      WarpButterflies<Layout::kLanesPerBlock>(quads[k], lane);
    }
    if constexpr (Layout::kQuadsPerBlock == 2) {
      Butterfly(quads[0].x, quads[1].x);
      Butterfly(quads[0].y, quads[1].y);
      Butterfly(quads[0].z, quads[1].z);
      Butterfly(quads[0].w, quads[1].w);
    }
    if constexpr (kSequency) {
      float* const warp_shared = shared + warp * Layout::kSharedFloats;
#pragma unroll
      for (int k = 0; k < kQuadsPerLane; ++k) {
        float* const out = warp_shared + in_warp[k] * (kBlock + Layout::kPadding);
        out[SequencyIndex(in_block[k], Layout::kLog2Block)] = quads[k].x;
        out[SequencyIndex(in_block[k] + 1, Layout::kLog2Block)] = quads[k].y;
        out[SequencyIndex(in_block[k] + 2, Layout::kLog2Block)] = quads[k].z;
        out[SequencyIndex(in_block[k] + 3, Layout::kLog2Block)] = quads[k].w;
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kQuadsPerLane; ++k) {
        quads[k] =
            LoadQuad<true>(warp_shared + in_warp[k] * (kBlock + Layout::kPadding) + in_block[k]);
      }
      __syncwarp();  // the next round writes where this one reads
    }
#pragma unroll
    for (int k = 0; k < kQuadsPerLane; ++k) {
      if (addresses[k] == nullptr) continue;
      const float4& q = quads[k];
      StoreQuad<kAligned>(addresses[k],
                          make_float4(q.x * scale, q.y * scale, q.z * scale, q.w * scale));
    }
  }
}

}  // namespace walsh::kernels::cuda
