// Products of many tokens with quantized weights: y[n, out] = x[n, in] · Wᵀ on the tensor cores in
// bf16, with weights that are dequantized on the way to them.
//
// What LowBitMatmul (worker/kernels/cuda/low_bit_matmul.h) is for a few tokens. Each weight is read
// and expanded once for up to 256 tokens, in registers; activations come as bf16 (token_tiles.h).
// Sums are fp32. In tiles of up to 128 tokens what is multiplied is code − zero, exactly, or to
// 2^-9 of it where the zero is no integer from -128 to 128, and the sum of a group is multiplied by
// its scale; in tiles of 256 it is the weight, to 2^-9 of it.
//
// A row of the result depends on no other token's values. Its order of sums depends on how the work
// is cut, and so on the number of tokens and the device; from run to run it has the same bits.
//
// Bound:   tensor cores from some 128 tokens on, below that the expansion of the weights
// Shapes:  row-major, rows of y are tokens
// Errors:  INVALID_ARGUMENT  sizes or alignments that do not fit, named with their limit
//          UNIMPLEMENTED     a device or a build without wgmma (compute 9.0a)
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/serving_layout.h"
#include "worker/kernels/cuda/token_tiles.h"

namespace walsh::kernels::cuda {

// How the work is cut. Zeros take what a model of the device's time says.
struct LowBitGemmTuning {
  int tile_tokens = 0;  // of a CTA: 16, 32, 64, 128 or 256
  int split = 0;        // CTAs that share a tile's columns: 1 to 8
};

struct LowBitGemmParams {
  int64_t n_tokens = 0;
  const ServingMatrix* weights = nullptr;
  TokenTiles x;                 // of at least n_tokens, and of the matrix' columns
  const float* bias = nullptr;  // [rows] in the stacked order, or null; added to v first
  LowBitOutput output = LowBitOutput::kStore;
  // One of the three, [n_tokens, rows], of pairs [n_tokens, rows / 2]; tiles only of pairs.
  float* y_float = nullptr;
  __nv_bfloat16* y_bf16 = nullptr;
  // Of these the columns that fill up the last piece are written, and no further piece: what fills
  // up tiles to a multiple of 128 columns must be zeros already.
  TokenTiles y_tiles;
  int64_t y_stride = 0;  // 0: as many as y has columns
  // Programmatic dependent launch: see dependent_launch.cuh. Weights are read before the kernel
  // before this one is done, which must not write them.
  bool overlap_previous = false;
  LowBitGemmTuning tuning;
  cudaStream_t stream = nullptr;
};
absl::Status LowBitGemm(const LowBitGemmParams& params);

// Whether this build and the current device have what it takes.
bool HasLowBitGemm();

}  // namespace walsh::kernels::cuda
