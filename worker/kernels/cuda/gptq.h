// GPTQ of one linear on the device, from weights and Hessian to packed tensors.
//
// Source:  Frantar et al. 2023, "GPTQ" (arXiv 2210.17323), algorithm 1; Li et al. 2025, "GPTAQ"
//          (arXiv 2504.02692)
// Symbols: W [rows, cols] weights (out × in); H [cols, cols] = XᵀX; U upper triangular with
//          H⁻¹ = UᵀU; columns are processed in the order `perm`.
//
// No inverse is formed: with P the reversal, P H P = L Lᵀ gives U = P L⁻¹ P (one Cholesky
// factorization and one triangular inverse, n³/3 flop each). The rows of W are independent, so one
// kernel takes a block of 128 columns through all its sequential steps on chip, a lane per row, the
// clip search included; a GEMM then updates the trailing columns. Grids and codes are those of
// worker/gptq/tile.h but for ties, which rounding decides.
//
// Shapes:  row-major; cols a multiple of 32; groups never cross a 128-column block unless they are
//          a multiple of 128 or the whole row, or static
// Errors:  INVALID_ARGUMENT, RESOURCE_EXHAUSTED; FAILED_PRECONDITION when H is not positive
//          definite with the damping given
// Memory:  FactorHessian cols² / 4 floats, in double 5/4 · cols² doubles; QuantizeColumns
//          rows · cols + 384 · (rows + cols) floats, with a correction 768
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {

inline constexpr int kGptqBlock = 128;

// Ladder, dead columns and order are decided by the caller from the diagonal.
struct FactorHessianParams {
  int64_t dim = 0;
  const float* h = nullptr;             // [dim, dim], symmetric
  const int32_t* perm = nullptr;        // [dim]: position → column
  const float* diagonal_add = nullptr;  // [dim] by column: damping, and 1 for dead columns
  float* u = nullptr;                   // [dim, dim], zero below the diagonal
  // Where float finds H not positive definite; at the rate of the device's double units.
  bool in_double = false;
};
// Runs on the context's side stream and synchronizes it to read the factorization's verdict.
absl::Status FactorHessian(Context& context, const FactorHessianParams& params);

// The error-propagated target, W += β W D (H + λI)⁻¹ with (H + λI)⁻¹ = Uᵀ U in processing order:
// see worker/gptq/error_propagation.h. In fp32 (products with W by 3×TF32, which keeps its
// precision): the inverse amplifies what rounding leaves in D's large directions.
struct PropagateErrorParams {
  int64_t rows = 0;
  int64_t cols = 0;
  float* w = nullptr;      // [rows, cols], natural order, updated
  float* cross = nullptr;  // [cols, cols]: Dᵀ = Σ x (x_original − x)ᵀ, natural order; used up
  const float* u = nullptr;       // [cols, cols] of FactorHessian
  const int32_t* perm = nullptr;  // [cols]
  double beta = 0;
};
// Memory: 3 · rows · cols + 2 · cols² floats; on the context's stream.
absl::Status PropagateError(Context& context, const PropagateErrorParams& params);

// GPTAQ's correction P = α · triu(D Uᵀ, 1) · U in processing order, by which columns make up for
// what the inputs lost: see worker/gptq/asymmetric_calibration.h. In fp32, for the reason above.
struct CorrectAsymmetryParams {
  int64_t cols = 0;
  float* cross = nullptr;  // [cols, cols]: Dᵀ = Σ x (x_original − x)ᵀ, natural order; used up
  const float* u = nullptr;       // [cols, cols] of FactorHessian
  const int32_t* perm = nullptr;  // [cols]
  double alpha = 0;
  float* correction = nullptr;  // [cols, cols]: P above the diagonal, on and below it anything
};
// Allocates nothing; on the context's stream.
absl::Status CorrectAsymmetry(Context& context, const CorrectAsymmetryParams& params);

struct QuantizeColumnsParams {
  int64_t rows = 0;
  int64_t cols = 0;
  const float* w = nullptr;  // [rows, cols], natural order
  // [cols, cols] of FactorHessian, aligned to 16 bytes; null: round to nearest.
  const float* u = nullptr;
  // [cols, cols] of CorrectAsymmetry, aligned likewise: each column adds its weight as it was
  // quantized times its row of P to the columns after it. Null: nothing; not read without u.
  const float* correction = nullptr;
  const int32_t* perm = nullptr;  // [cols]
  // [cols]: gptq::ColumnsByGroup of an order that scatters the columns of a group. All grids are
  // then chosen before the first column, from the weights as they are given ("static groups").
  // Null: `perm` keeps groups together, and a grid is chosen at the first column of its group.
  const int32_t* static_groups = nullptr;
  const uint8_t* dead = nullptr;  // [cols] by column: 1 sets the column's weights to 0; or null
  int bits = 4;
  int64_t group_size = 128;  // 32, 64, a multiple of 128 or cols
  bool symmetric = false;
  bool mse_clip = true;
  // Outputs, natural order.
  uint8_t* codes = nullptr;  // [rows, cols]
  float* scales = nullptr;   // [rows, cols / group_size], exact in half precision
  uint8_t* zeros = nullptr;  // [rows, cols / group_size]
  // [rows]: Σ ((w − q) / U_jj)² = the row's share of tr(ΔW (H + damping) ΔWᵀ); or null.
  float* loss = nullptr;
};
absl::Status QuantizeColumns(Context& context, const QuantizeColumnsParams& params);

// Integers and grids to the artifact's gptq_v2 tensors (docs/artifact-format.md) and, for the
// forward pass, to bf16. Any output may be null.
struct PackParams {
  int64_t rows = 0;
  int64_t cols = 0;
  int bits = 4;
  int64_t group_size = 128;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  const uint8_t* zeros = nullptr;
  uint32_t* qweight = nullptr;           // [cols / 32 · bits, rows]
  uint32_t* qzeros = nullptr;            // [groups, rows / 32 · bits]
  __half* half_scales = nullptr;         // [groups, rows]
  __nv_bfloat16* dequantized = nullptr;  // [rows, cols]
  cudaStream_t stream = nullptr;
};
absl::Status Pack(const PackParams& params);

}  // namespace walsh::kernels::cuda
