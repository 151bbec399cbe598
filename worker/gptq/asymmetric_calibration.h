// The asymmetric-calibration term of GPTAQ: while its columns are quantized, a linear makes up for
// what its inputs lost.
//
// When a linear's turn comes, the layers before it are quantized, and its inputs x differ from the
// x_fp of the original model. GPTQ minimises the error of W x; GPTAQ minimises that to W x_fp. To
// each column's update it adds that of the columns left which gives, in least squares, what the
// column's own weight would have made of its input's difference:
//
//   after column i:  w_F += w_i · P(i, F),   P(i, F) = α D(i, F) (H_FF + λI)⁻¹,
//
// with F the columns not yet quantized and w_i updated and not yet quantized. All rows of P at once
// are α · triu(D Uᵀ, 1) · U, since the rows and columns F of U factorize the inverse of H_FF + λI.
// α below 1 keeps it from over-fitting the calibration tokens.
//
// Source:  Li et al. 2025, "GPTAQ" (arXiv 2504.02692)
// Symbols: D = Σ (x_fp − x) xᵀ [in, in] in H's scale; H, λ and U as in worker/gptq/hessian.h
// Errors:  INVALID_ARGUMENT  shapes do not fit
//          and what `keep_going` returns
// Threads: over the stream's pool; results do not depend on its size
// Memory:  an [in, in] float matrix, which stays in the factor
#pragma once

#include "absl/status/status.h"
#include "common/keep_going.h"
#include "worker/gptq/hessian.h"
#include "worker/kernels/kernels.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq {

// Sets factor.correction to P. `cross` is Dᵀ, natural order. Changes nothing where there is no
// factor, nor where it was stopped: `keep_going` is asked before every kProductRows rows, which
// take seconds for the widest linears.
absl::Status AddAsymmetricCalibration(const Matrix& cross, double alpha,
                                      const kernels::Stream& stream, HessianFactor& factor,
                                      const KeepGoing& keep_going = {});

}  // namespace walsh::gptq
