// Products of a few tokens with quantized weights: y[n, out] = x[n, in] · Wᵀ for n from 1 to 64.
//
// Weights are multiplied as the exact integers that their codes are, and activations as block fixed
// point: 16 bits for each, with one power of two for a token and 128 columns
// (worker/kernels/cuda/fixed_point.cuh). Products and sums of integers are exact, so that what
// differs from a product with the dequantized weights in double is the rounding of the activations,
// to 2^-16 of the largest of 128: below 1e-5 of the result's norm for bf16 activations of a normal
// distribution, most of which are represented exactly, 4e-5 for fp32 ones (rounding them to bf16
// loses 1.6e-3) and 1e-4 where one column is 50 times the others.
//
// The weights are the A operand of mma.m16n8k32 with 8-bit operands, the two bytes of an activation
// two of its columns, so that the tensor cores work from one token on. One logic instruction makes
// four codes an operand (serving_codes.h). For each group
//   y += scale · 2^e · (256 · Σ code · hi + Σ code · lo − zero · Σ q)
// A codebook is a + b · low bit + d · high bit + e · both, so it is three products of bits.
//
// RMSNorm of the activations is part of the product: its weights multiply them before they are
// rounded, its factor the result.
//
// So is what a column's activation becomes first: columns may stand in another order than the
// activations (act-order), and blocks of them be rotated by a Hadamard matrix, W (x H): on the way
// from memory to the 16 bits, in fp32, by the lanes that hold them.
//
// A row of the result depends on its own token only: alone or among any others, with or without a
// workspace, and from run to run, it has the same bits, since sums of fp32 have one order. An
// activation that is not finite makes all of its token's outputs NaN; 128 columns that are all
// below 2^-100 count as zeros.
//
// Bound:   memory: the weights are read once for up to 16 tokens, and from the L2 for 16 more
// Shapes:  row-major, rows of x and y are tokens
// Errors:  INVALID_ARGUMENT  sizes or alignments that do not fit, named with their limit
//          UNIMPLEMENTED     more tokens than kLowBitTokensMax; a device before compute 9.0
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/serving_codes.h"
#include "worker/kernels/cuda/serving_layout.h"

namespace walsh::kernels::cuda {

inline constexpr int64_t kLowBitTokensMax = 64;
inline constexpr int64_t kLowBitTokensAlone = 4;  // those that need no workspace
// Blocks of columns that a product can rotate: those that the lanes of a block of 128 hold.
constexpr bool IsLowBitRotation(int64_t block) {
  return block == 16 || block == 32 || block == 64 || block == 128;
}

enum class LowBitOutput {
  kStore,    // y = v
  kAdd,      // y += v, for the residual stream; fp32 only
  kSiluMul,  // y[:, i] = SiLU(v of row i of the first linear) · (that of the second); the matrix'
             // rows must be interleaved
  kGeluMul,  // the same with GELU by its tanh formula
};
// Whether outputs are made of pairs of rows.
WALSH_HOST_DEVICE constexpr bool IsOfPairs(LowBitOutput output) {
  return output == LowBitOutput::kSiluMul || output == LowBitOutput::kGeluMul;
}

// How the work is cut, which changes no bit of the result. Zero takes what was measured to be best
// for the shape.
struct LowBitTuning {
  int row_tiles = 0;    // of a warp at a time: 2 or 4; fewer where they do not fit
  int ctas_per_sm = 0;  // of one product
};

// What a product of up to kLowBitTokensAlone tokens takes of a multiprocessor's shared memory: a
// CTA of each of two neighbours in a chain of overlapping launches fits on one. The hardware may
// place two CTAs of a kernel where there is room for both and none on another multiprocessor, and
// the whole device then waits for the two. So neighbours take turns: two larger parts do not fit,
// and beside a larger one, which every multiprocessor then has, there is room for one smaller part.
enum class SharedPart { kSmaller, kLarger };

struct LowBitMatmulParams {
  int64_t n_tokens = 0;
  const ServingMatrix* weights = nullptr;
  // One of the two, [n_tokens, cols], aligned to 16 bytes.
  const __nv_bfloat16* x = nullptr;
  const float* x_float = nullptr;
  int64_t x_stride = 0;  // 0: cols; a multiple of 8
  // RMSNorm first: W (norm_weight * x) / sqrt(mean(x^2) + eps).
  bool has_norm = false;
  const float* norm_weight = nullptr;  // [cols], aligned to 16 bytes, or null: ones
  float eps = 0;
  // [cols] on the device, aligned to 16 bytes: column c of W multiplies activation (and norm
  // weight) input_order[c], a permutation; null: c.
  const int32_t* input_order = nullptr;
  // Then, behind the norm: each block of so many columns is multiplied by the orthonormal Hadamard
  // matrix in natural order. See IsLowBitRotation; 0: none.
  int64_t rotation_block = 0;
  const float* bias = nullptr;  // [rows] in the stacked order, or null; added to v first
  LowBitOutput output = LowBitOutput::kStore;
  // One of the two, [n_tokens, rows], of pairs [n_tokens, rows / 2].
  float* y_float = nullptr;
  __nv_bfloat16* y_bf16 = nullptr;
  int64_t y_stride = 0;  // 0: as many as y has columns
  // Programmatic dependent launch: the kernel may start while the one before it in the stream ends,
  // and reads weights meanwhile; x, y and bias are touched once that one is done. The kernel before
  // must not write the weights.
  bool overlap_previous = false;
  SharedPart shared_part = SharedPart::kSmaller;
  // Scratch for more than kLowBitTokensAlone tokens, LowBitWorkspaceBytes of it, aligned to 16
  // bytes; products in one stream may share it. Without one those products are right, but slower.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
  LowBitTuning tuning;
  cudaStream_t stream = nullptr;
};
absl::Status LowBitMatmul(const LowBitMatmulParams& params);

int64_t LowBitWorkspaceBytes(int64_t n_tokens, int64_t cols);

}  // namespace walsh::kernels::cuda
