// The kernels behind PackedMatmul, one for each instruction set.
#pragma once

#include <cstdint>
#include <span>

#include "worker/kernels/cpu/packed_storage.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels::cpu {

// Tokens' activations rounded to int8 (rule: packed_matrix.h), columns padded with 0 to whole
// blocks.
struct RoundedActivations {
  int64_t n_tokens = 0;
  int64_t n_blocks = 0;
  const int8_t* codes = nullptr;      // [n_tokens, n_blocks · 32]
  const float* scales = nullptr;      // [n_tokens, n_blocks]
  const float* group_sums = nullptr;  // [n_tokens, n_groups]: Σ scale · Σ codes over a group
};

// 16 rows of a product: y[t, row] for every token t of `x`.
//
//   y = factor · Σ_groups w_scale · (Σ_blocks x_scale · float(Σ code · x_code) − zero · group_sum)
//       + bias
//
// in this order, with fused multiply-adds; the innermost sum is exact in int32. With a codebook
// (packed_matrix.h; l and h are the bits of a code)
//
//   y = Σ_groups (L0 · group_sum + (L1 − L0) · Σ_blocks x_scale · float(Σ l · x_code)
//                                + (L2 − L0) · Σ_blocks x_scale · float(Σ h · x_code)
//                                + (L3 − L2 − L1 + L0) · Σ_blocks x_scale · float(Σ h l · x_code))
//       + bias.
struct PackedTile {
  const uint8_t* codes = nullptr;  // packed, or one byte a code when `expanded`
  const uint16_t* scales = nullptr;
  const uint8_t* zeros = nullptr;         // null: float_zeros, or uniform_zero
  const uint16_t* float_zeros = nullptr;  // half precision; null: uniform_zero
  const uint16_t* levels = nullptr;       // half precision, [groups][4][16]; null: no codebook
  float uniform_zero = 0;
  float factor = 1;
  int64_t n_groups = 0;
  int64_t blocks_per_group = 0;
  RoundedActivations x;
  const float* bias = nullptr;  // of the tile's first row, or null
  int64_t n_rows = 0;           // valid rows, 1 … 16
  float* y = nullptr;           // of the tile's first row
  int64_t y_stride = 0;
};

struct PackedKernel {
  // Codes of `bits` bits, as packed or, for many tokens, expanded to bytes first.
  void (*multiply)(const PackedTile& tile, int bits, bool expanded) = nullptr;
  // With a codebook, of 2 bits.
  void (*multiply_levels)(const PackedTile& tile, bool expanded) = nullptr;
  // One byte a code, in the order of the 8-bit layout; `n_blocks` blocks.
  void (*expand)(const uint8_t* codes, int bits, int64_t n_blocks, uint8_t* bytes) = nullptr;
  // From this many tokens on, expanding a tile once costs less than unpacking it for each handful.
  int64_t expand_tokens_min = 0;
  const char* name = "";
};

PackedKernel ScalarPackedKernel();
PackedKernel Avx2PackedKernel();        // needs CpuFeatures::avx2_fma
PackedKernel Avx512VnniPackedKernel();  // needs CpuFeatures::avx512_vnni

// The best that this machine runs.
const PackedKernel& BestPackedKernel();

absl::Status PackedMatmulWith(const PackedKernel& kernel, std::span<const PackedMatmulParams> items,
                              const Stream& stream);

// Rounds one token's row; `codes` has n_blocks · 32 places, `scales` and `sums` (scale · Σ codes)
// n_blocks.
void RoundRow(const float* x, int64_t cols, int8_t* codes, float* scales, float* sums);

}  // namespace walsh::kernels::cpu
