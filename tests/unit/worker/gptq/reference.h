// GPTQ as the paper writes it, and GPTAQ, slowly, in double: the oracle of the tests.
//
// Shares no step with the product (only the rounding of scales to half precision): the inverse
// Hessian comes from Gauss-Jordan elimination and is updated explicitly after each column
// (equations 2 and 3), with no Cholesky factor and no blocks. What is left of it is the inverse for
// the columns left, by which GPTAQ's term is the regression that it is derived from.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/gptq/options.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq::reference {

struct Result {
  std::vector<uint8_t> codes;  // [rows, cols]
  std::vector<double> scales;  // [rows, groups]
  std::vector<double> zeros;   // [rows, groups]
  std::vector<double> levels;  // [rows, groups, 4], of a codebook
  std::vector<int32_t> order;  // the column of each step
  // How far the choice was from falling the other way: of a code, the distance of the scaled
  // weight from the middle between two codes; of a grid, the relative gap between the two lowest
  // errors (1 without search).
  std::vector<double> code_margin;  // [rows, cols]
  std::vector<double> grid_margin;  // [rows, groups]
  double error = 0;                 // tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)
};

// `cross` is Dᵀ of worker/gptq/asymmetric_calibration.h, for GPTAQ.
Result Quantize(const Matrix& weights, const Matrix& hessian, const Options& options,
                const Matrix& cross = {});

}  // namespace walsh::gptq::reference
