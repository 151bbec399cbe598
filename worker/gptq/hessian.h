// What all linears that read one input share: the Hessian, its column order and its factor.
//
// GPTQ needs the upper factor U of the inverse Hessian, (H + λI)⁻¹ = Uᵀ U. It is found without
// forming the inverse: with J the reversal of rows and columns, J (H + λI) J = L Lᵀ gives
// U = J L⁻¹ J. A Hessian that is not positive definite is normal, not rare (few samples, duplicate
// inputs), so damping grows by tens and ends at 10 % (or at what was asked for, where that is
// more), then the factorization is tried in double, and at last the caller rounds to nearest and
// says why.
//
// Source:  Frantar et al. 2023, "GPTQ" (arXiv 2210.17323), section 3.3; group-aware order as in
//          GPTQModel; act-order as in the paper's code
// Symbols: H [in, in] = Σ x xᵀ over calibration tokens, any scale   λ = damp · mean of the diagonal
//          over live columns
// Errors:  INVALID_ARGUMENT  not square, options out of range
//          DATA_LOSS         a non-finite or negative element; the message names it
//          and what `keep_going` returns
// Memory:  two [in, in] float matrices; while it works two of double when float does not suffice
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/gptq/options.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq {

struct HessianFactor {
  Matrix hessian;              // as given, natural order
  std::vector<int32_t> order;  // the column that is quantized at each step
  Matrix upper;                // [in, in] U in that order, zero below; empty with a fallback or RTN
  // [in, in] P of worker/gptq/asymmetric_calibration.h in that order; empty but for GPTAQ.
  Matrix correction;
  // Columns whose input was always zero: their weights become zero.
  std::vector<uint8_t> is_dead;
  int64_t dead_columns = 0;
  double damp = 0;       // share of the mean diagonal that was needed
  std::string fallback;  // why there is no factor; empty when there is one
};

// Rows of a product with an [in, in] matrix between two questions whether to go on: seconds for the
// widest linears.
inline constexpr int64_t kProductRows = 256;

// `name` is used in messages. For Method::kRtn nothing is factorized. Asks `keep_going` before each
// step of the damping ladder.
absl::StatusOr<HessianFactor> FactorizeHessian(Matrix hessian, const Options& options,
                                               std::string_view name,
                                               const KeepGoing& keep_going = {});

// The parts of it that a device needs for its own factorization. The order in which the columns are
// quantized, from the Hessian's diagonal; options.group_size divides its length.
std::vector<int32_t> ColumnSteps(std::span<const float> diagonal, const Options& options);
// The same columns group by group, those of a group in the order of their steps: that in which the
// grids of static groups are chosen.
std::vector<int32_t> ColumnsByGroup(std::vector<int32_t> steps, int64_t group_size);
// Shares of the mean diagonal, tried in order.
std::vector<double> DampingLadder(double damp);
// Why there is no factor: no live column; nothing helped, `damp` being the last step of the ladder.
std::string NoInputFallback();
std::string NotDefiniteFallback(double damp);

}  // namespace walsh::gptq
