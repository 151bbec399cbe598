// The error-propagated target of a linear: weights that make up for what its inputs lost.
//
// When a linear's turn comes, the layers before it are quantized, and its inputs x differ from the
// x_fp of the original model. Of all weights, those that give the original output from the inputs
// that there are, in least squares over the calibration tokens,
//
//   argmin over V of Σ ‖W x_fp − V x‖² + λ ‖V − W‖²  =  W + W D (H + λI)⁻¹,   D = Σ (x_fp − x) xᵀ,
//
// and it is these that are quantized. β scales the step: all of it (1) fits the calibration tokens
// best and over-fits where they are few or layers many, half of it (0.5) is the careful choice.
//
// Source:  derived from the objective above; the idea is QEP's (quantization error propagation,
//          2025)
// Symbols: W [out, in]   H, λ and its factor as in worker/gptq/hessian.h, D in H's scale
// Errors:  INVALID_ARGUMENT  shapes do not fit
//          and what `keep_going` returns
// Threads: over the stream's pool; results do not depend on its size
// Memory:  kProductRows rows of W in floats, twice
#pragma once

#include "absl/status/status.h"
#include "common/keep_going.h"
#include "worker/gptq/hessian.h"
#include "worker/kernels/kernels.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq {

// W += β W D (H + λI)⁻¹, with the damping that the factor needed. `cross` is Dᵀ, natural order.
// Changes nothing where there is no factor. `keep_going` is asked before every kProductRows rows;
// where it stops, those before it are changed and the others are not.
absl::Status PropagateError(const Matrix& cross, const HessianFactor& factor, double beta,
                            const kernels::Stream& stream, Matrix& weights,
                            const KeepGoing& keep_going = {});

}  // namespace walsh::gptq
