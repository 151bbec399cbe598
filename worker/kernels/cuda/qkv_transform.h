// What becomes of a row of the product with the weights of q, k and v before attention sees it:
//
//   x += bias                                        where there is one
//   x ← x / sqrt(mean(x²) + eps) · norm              each head of q and k, where there are norms
//   x[i], x[i + d/2] ← rotated by position · inverse_frequency[i]         each head of q and k
//
// Arithmetic is fp32 and rounded to bf16 once. The angle is reduced in double: in fp32 it would be
// off by 2^-7 at positions of 2^17, more than bf16's rounding. The half-split layout is that of
// kernels::Rope. All vectors are in device memory, aligned to 8 bytes.
#pragma once

namespace walsh::kernels::cuda {

struct QkvTransform {
  const float* bias = nullptr;                 // [(n_heads + 2 n_kv_heads) · head_dim], or null
  const float* q_norm = nullptr;               // [head_dim], or null
  const float* k_norm = nullptr;               // [head_dim], or null
  float eps = 0;                               // of the norms
  const float* inverse_frequencies = nullptr;  // [head_dim / 2]
};

}  // namespace walsh::kernels::cuda
