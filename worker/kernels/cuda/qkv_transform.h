// What becomes of a row of the product with the weights of q, k and v before attention sees it:
//
//   x += bias                                        where there is one
//   x ← x / sqrt(mean(x²) + eps) · norm              each head of q and k, where there are norms
//   x[i], x[i + d/2] ← rotated by position · inverse_frequency[i]         each head of q and k
//   x ← x · R3                                       each head of q and k, where the pool is
//   quantized
//
// R3 is the orthonormal Hadamard or Walsh matrix of the head's width (docs/rotations.md). It
// cancels in q · kᵀ and so does the order of its columns, which matters to groups within a head
// alone: where a head has one grid, both matrices are in natural order.
//
// Arithmetic is fp32 and rounded once, to bf16 or to the pool's grid. The angle is reduced in
// double: in fp32 it would be off by 2^-7 at positions of 2^17, more than bf16's rounding. The
// half-split layout is that of kernels::Rope. All vectors are in device memory, aligned to 8 bytes.
#pragma once

namespace walsh::kernels::cuda {

enum class HeadTransform { kNone, kHadamard, kWalsh };  // Walsh: by sequency

struct QkvTransform {
  const float* bias = nullptr;                 // [(n_heads + 2 n_kv_heads) · head_dim], or null
  const float* q_norm = nullptr;               // [head_dim], or null
  const float* k_norm = nullptr;               // [head_dim], or null
  float eps = 0;                               // of the norms
  const float* inverse_frequencies = nullptr;  // [head_dim / 2]
  HeadTransform heads = HeadTransform::kNone;  // R3; others need head_dim to be a power of two
};

}  // namespace walsh::kernels::cuda
