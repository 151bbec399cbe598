// One plain struct of pointers and sizes per operation.
//
// Row-major. The product convention is y[n_tokens, out] = x[n_tokens, in] · W[out, in]ᵀ. Strides
// count elements between rows. Pointers are never null unless the comment says so; sizes may be 0.
#pragma once

#include <cstdint>

namespace walsh::kernels {

struct MatmulParams {
  int64_t n_tokens = 0;
  int64_t in = 0;
  int64_t out = 0;
  const float* x = nullptr;        // [n_tokens, in]
  int64_t x_stride = 0;            // ≥ in
  const float* weights = nullptr;  // [out, in]
  const float* bias = nullptr;     // [out] or null
  float* y = nullptr;              // [n_tokens, out]
  int64_t y_stride = 0;            // ≥ out
  bool accumulate = false;         // y += instead of y =
};

// H[d, d] += Xᵀ X, both triangles written; X [n_tokens, d].
struct GramParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  float* h = nullptr;
};

// C[d, d] += Xᵀ Y; X, Y [n_tokens, d].
struct CrossGramParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* y = nullptr;
  int64_t y_stride = 0;
  float* c = nullptr;
};

// C[m, n] −= A[m, k] · B[k, n]: the trailing update of GPTQ.
struct SubtractProductParams {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t b_stride = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
};

// y = x / sqrt(mean(x²) + eps) · weight, by row.
struct RmsNormParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const float* x = nullptr;
  const float* weight = nullptr;  // [dim], or null for ones
  float eps = 1e-5f;
  float* y = nullptr;  // may be x
};

// Rotary embedding in the half-split layout of HF: pairs (i, i + head_dim/2) of each head.
struct RopeParams {
  int64_t n_tokens = 0;
  int64_t n_heads = 0;
  int64_t head_dim = 0;
  const int32_t* positions = nullptr;          // [n_tokens]
  const float* inverse_frequencies = nullptr;  // [head_dim / 2]
  float* x = nullptr;                          // [n_tokens, n_heads · head_dim], in place
  int64_t x_stride = 0;
};

// Rows of keys or values that lie together in a paged KV cache. Every piece in which the CPU's
// attention walks keys is a multiple of it; half a block of memory is idle at a sequence's end; and
// prompts are shared in whole blocks: smaller ones would save little memory and cost more steps.
inline constexpr int64_t kKvBlockTokens = 16;

// From keys or values to row `row`: rows follow one another, or those of one block do where
// `blocks` is not null.
inline int64_t KvRowOffset(int64_t row, int64_t stride, const int32_t* blocks,
                           int64_t block_stride) {
  if (blocks == nullptr) return row * stride;
  return blocks[row / kKvBlockTokens] * block_stride + row % kKvBlockTokens * stride;
}

// Causal grouped-query attention of one sequence: new token i sees keys 0 … n_past + i, or the last
// `window` of them.
struct AttentionParams {
  int64_t n_new = 0;
  int64_t n_past = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t window = 0;        // 0: none
  float scale = 0;           // 1 / sqrt(head_dim)
  const float* q = nullptr;  // [n_new, n_heads · head_dim], after RoPE
  int64_t q_stride = 0;
  const float* k = nullptr;  // [n_past + n_new, n_kv_heads · head_dim], after RoPE
  const float* v = nullptr;  // the same
  int64_t kv_stride = 0;
  // Where k and v are paged: the block of each kKvBlockTokens rows, [⌈(n_past + n_new) /
  // kKvBlockTokens⌉]. Null: the rows follow one another.
  const int32_t* blocks = nullptr;
  int64_t block_stride = 0;  // between blocks, in k as in v; ≥ kKvBlockTokens · kv_stride
  float* y = nullptr;        // [n_new, n_heads · head_dim]
  int64_t y_stride = 0;

  int64_t KvOffset(int64_t row) const { return KvRowOffset(row, kv_stride, blocks, block_stride); }
};

// y = silu(gate) · up, element-wise.
struct SiluMultiplyParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  const float* up = nullptr;
  int64_t up_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// y = gelu(gate) · up, element-wise, with GELU by its tanh formula: x/2 · (1 + tanh(√(2/π) · (x +
// 0.044715 x³))).
struct GeluMultiplyParams {
  int64_t n_tokens = 0;
  int64_t dim = 0;
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  const float* up = nullptr;
  int64_t up_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
};

// y += x
struct AddParams {
  int64_t n = 0;
  const float* x = nullptr;
  float* y = nullptr;
};

// Each block of `block` columns of each row is multiplied by the orthonormal Hadamard (natural
// order) or Walsh (sequency order) matrix; both are symmetric, so this is its own inverse. In
// place.
struct BlockWalshParams {
  int64_t rows = 0;
  int64_t cols = 0;   // a multiple of block
  int64_t block = 0;  // a power of two
  bool sequency = true;
  float* x = nullptr;
  int64_t x_stride = 0;
};

// Each group of `group` columns of each row ← the values of its integer grid that are nearest, in
// place. With hi = clip · max(x, 0) and lo = clip · min(x, 0) of the group:
//   symmetric   scale = max(hi, −lo) / (2^(bits−1) − 1), codes −2^(bits−1) … 2^(bits−1) − 1
//   asymmetric  scale = (hi − lo) / (2^bits − 1), codes −z … 2^bits − 1 − z, z = round(−lo / scale)
//   x ← scale · clamp(round(x / scale)), halves to even
// A group with a value that is not finite becomes NaN; one that spans less than 2^-100 zero.
// Source: QuaRot (arXiv 2404.00456), quantization of activations and of the KV cache
struct FakeQuantizeParams {
  int64_t rows = 0;
  int64_t cols = 0;   // a multiple of group
  int64_t group = 0;  // values that share a scale
  int bits = 8;       // 2 to 8
  bool symmetric = true;
  float clip = 1;  // in (0, 1]
  float* x = nullptr;
  int64_t x_stride = 0;
};

// loss[i] = logsumexp(logits[i]) − logits[i][target[i]], in double inside.
struct CrossEntropyParams {
  int64_t n_tokens = 0;
  int64_t vocab = 0;
  const float* logits = nullptr;     // [n_tokens, vocab]
  const int32_t* targets = nullptr;  // [n_tokens], each in [0, vocab)
  double* loss = nullptr;            // [n_tokens]
};

// divergence[i] = KL(p ‖ q) = Σ p (log p − log q) over the vocabulary, in nats, of the softmaxes p
// of reference[i] and q of logits[i], in double inside; agrees[i] = 1 where their largest logits
// have one index (the lowest of equals), else 0.
struct KlDivergenceParams {
  int64_t n_tokens = 0;
  int64_t vocab = 0;
  const float* reference = nullptr;  // [n_tokens, vocab]
  const float* logits = nullptr;     // [n_tokens, vocab]
  double* divergence = nullptr;      // [n_tokens]; rounding can leave it slightly below 0
  int32_t* agrees = nullptr;         // [n_tokens]
};

}  // namespace walsh::kernels
