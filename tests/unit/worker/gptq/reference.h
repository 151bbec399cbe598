// GPTQ as the paper writes it, slowly, in double: the oracle of the tests.
//
// Shares no step with the product (only the rounding of scales to half precision): the inverse
// Hessian comes from Gauss-Jordan elimination and is updated explicitly after each column
// (equations 2 and 3), with no Cholesky factor and no blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/gptq/options.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq::reference {

struct Result {
  std::vector<uint8_t> codes;  // [rows, cols]
  std::vector<double> scales;  // [rows, groups]
  std::vector<int> zeros;      // [rows, groups]
  std::vector<int32_t> order;  // the column of each step
  // How far the choice was from falling the other way: of a code, the distance of the scaled
  // weight from the middle between two codes; of a grid, the relative gap between the two lowest
  // errors (1 without search).
  std::vector<double> code_margin;  // [rows, cols]
  std::vector<double> grid_margin;  // [rows, groups]
  double error = 0;                 // tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)
};

Result Quantize(const Matrix& weights, const Matrix& hessian, const Options& options);

}  // namespace walsh::gptq::reference
