// Quantizes one linear: round to nearest, GPTQ, or GPTAQ.
//
// GPTQ quantizes one column after another, in the factor's order, and spreads each column's error
// over the columns not yet quantized so that the output changes least on the calibration inputs.
// Columns go by blocks of at most 128: inside a block updates are applied at once, behind it by one
// matrix product. A group's grid is chosen when its first column is reached, from weights that
// carry all updates so far, also those of the running block (the reference implementation reads
// stale ones there). Act-order, which scatters a group's columns over the steps, chooses all grids
// before the first step, from the weights as they are given ("static groups"). A column's group is
// that of its place in the layer in every order, so g_idx is trivial. GPTAQ is GPTQ with the term
// of worker/gptq/asymmetric_calibration.h, which the factor carries. With a codebook a group's
// levels are fitted (worker/gptq/codebook.h) where its grid would be chosen, a column's weight in
// the fit being 1 / U(i, i)², by which its error counts.
//
// Source:  Frantar et al. 2023, "GPTQ" (arXiv 2210.17323), algorithm 1; static groups as in the
//          paper's code
// Symbols: W [out, in] weights, rows independent   H [in, in], U from worker/gptq/hessian.h
// Errors:  INVALID_ARGUMENT  shapes do not fit, group does not divide `in`
//          DATA_LOSS         a non-finite weight or result; the message names linear and index
//          and what `keep_going` returns
// Threads: rows are cut into fixed tiles over `pool`; results do not depend on its size
// Memory:  four times W in floats, besides W and the codes; with act-order its grids once more
#pragma once

#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/gptq/hessian.h"
#include "worker/gptq/options.h"
#include "worker/kernels/thread_pool.h"
#include "worker/tensor/matrix.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::gptq {

struct QuantizedLinear {
  QuantizedMatrix matrix;
  Matrix dequantized;  // [out, in], what the matrix stands for
  // tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the squared output error on the calibration inputs over the squared
  // output. 0 without error, 1 when only the output is 0.
  double relative_error = 0;
  // Groups whose range exceeds what half-precision scales or levels can express.
  int64_t clamped_groups = 0;
};

// Asks `keep_going` between blocks of columns.
absl::StatusOr<QuantizedLinear> QuantizeLinear(std::string_view name, const Matrix& weights,
                                               const HessianFactor& factor, const Options& options,
                                               ThreadPool& pool, const KeepGoing& keep_going = {});

}  // namespace walsh::gptq
