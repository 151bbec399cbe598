// The operations of a decoder layer on the device, for calibration and evaluation in large batches.
//
// Activations are bf16 with fp32 arithmetic inside; the residual stream stays fp32, so that the sum
// over layers is not rounded at each. The fp32 forms exist for the rotation's equivalence gate.
//
// Shapes:  row-major, rows are tokens; windows of `window` tokens follow one another
// Errors:  INVALID_ARGUMENT for sizes that an operation does not take; RESOURCE_EXHAUSTED
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {

using bf16 = __nv_bfloat16;

// y[n, out] = x[n, in] · W[out, in]ᵀ (+ y when `accumulate`), fp32 accumulation on the tensor
// cores.
template <typename Out>
struct GemmParams {
  int64_t n_tokens = 0;
  int64_t in = 0;
  int64_t out = 0;
  const bf16* x = nullptr;
  const bf16* weights = nullptr;
  Out* y = nullptr;      // bf16 or float
  int64_t y_stride = 0;  // 0: out
  bool accumulate = false;
};
absl::Status Gemm(Context& context, const GemmParams<bf16>& params);
absl::Status Gemm(Context& context, const GemmParams<float>& params);

// The same in fp32 without TF32, for the gate.
struct GemmFp32Params {
  int64_t n_tokens = 0;
  int64_t in = 0;
  int64_t out = 0;
  const float* x = nullptr;
  const float* weights = nullptr;
  float* y = nullptr;
  bool accumulate = false;
};
absl::Status GemmFp32(Context& context, const GemmFp32Params& params);

// H[d, d] += Xᵀ X. Products of bf16 are exact in fp32, so only the order of summation differs from
// an fp32 Hessian. Blocks on and below the diagonal are computed; MirrorGram fills the rest at the
// end.
struct GramParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const bf16* x = nullptr;
  float* h = nullptr;
};
absl::Status AccumulateGram(Context& context, const GramParams& params);
absl::Status MirrorGram(Context& context, int64_t dim, float* h);
// The diagonal of h [dim, dim] in a row, for one copy to the host instead of a strided one.
absl::Status Diagonal(Context& context, int64_t dim, const float* h, float* diagonal);

// C[d, d] += Xᵀ Y, all of it.
struct CrossGramParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const bf16* x = nullptr;
  const bf16* y = nullptr;
  float* c = nullptr;
};
absl::Status AccumulateCrossGram(Context& context, const CrossGramParams& params);

// y = a − b, rounded once.
absl::Status Subtract(Context& context, int64_t n, const bf16* a, const bf16* b, bf16* y);

// x[i, :] += bias
template <typename T>
absl::Status AddBias(Context& context, int64_t n_tokens, int64_t dim, const float* bias, T* x);

// y = x / sqrt(mean(x²) + eps) · weight; `weight` null means ones (folded).
template <typename Out>
absl::Status RmsNorm(Context& context, int64_t n_tokens, int64_t dim, const float* x,
                     const float* weight, float eps, Out* y);

// Rotary embedding in the half-split layout, in place; position of row i is i mod window.
template <typename T>
absl::Status Rope(Context& context, int64_t n_tokens, int64_t n_heads, int64_t head_dim,
                  int64_t window, const float* inverse_frequencies, T* x);

// Causal grouped-query attention inside each window; never stores the score matrix. Tensors of bf16
// begin at multiples of 16 bytes.
template <typename T>
struct WindowAttentionParams {
  int64_t n_windows = 0;
  int64_t window = 0;  // at most 12284 for float
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;  // 16, 32, 64 or 128 for bf16; up to 256 for float
  const T* q = nullptr;  // [n_windows · window, n_heads · head_dim]
  const T* k = nullptr;  // [n_windows · window, n_kv_heads · head_dim]
  const T* v = nullptr;
  T* y = nullptr;  // as q
};
absl::Status WindowAttention(Context& context, const WindowAttentionParams<bf16>& params);
absl::Status WindowAttention(Context& context, const WindowAttentionParams<float>& params);

// y = silu(gate) · up
template <typename T>
absl::Status SiluMultiply(Context& context, int64_t n, const T* gate, const T* up, T* y);
// y = gelu(gate) · up, by the tanh formula
template <typename T>
absl::Status GeluMultiply(Context& context, int64_t n, const T* gate, const T* up, T* y);

// hidden[i, :] = embedding[ids[i], :]
template <typename T>
absl::Status Embed(Context& context, int64_t n_tokens, int64_t dim, const int32_t* ids,
                   const T* embedding, float* hidden);

// loss[i] = logsumexp(logits[i, :]) − logits[i, target[i]]
absl::Status CrossEntropy(Context& context, int64_t n_tokens, int64_t vocab, const float* logits,
                          const int32_t* targets, double* loss);

// kl[i] = Σ_v p(v) (log p(v) − log q(v)) of the softmaxes of `reference` (p) and `logits` (q);
// top1[i] = 1 where their arg max agree.
absl::Status KlDivergence(Context& context, int64_t n_tokens, int64_t vocab, const float* reference,
                          const float* logits, double* kl, int32_t* top1);

template <typename From, typename To>
absl::Status Convert(Context& context, int64_t n, const From* from, To* to);

}  // namespace walsh::kernels::cuda
