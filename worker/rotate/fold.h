// Folding of norms and rotations into weights, so that the model computes the same function.
//
// Readers of the residual stream (q, k, v, gate, up, lm_head) become W diag(γ) R1 with γ the norm
// before them; writers (o, down) become R1ᵀ W, their biases R1ᵀ b; embedding rows become e R1. R2
// acts on attention values per head: each KV head's rows of v (and of its bias) become R2ᵀ V, each
// query head's columns of o become O R2, which is exact under grouped-query attention because every
// query head of a group reads the same rotated values. RMSNorm without weight commutes with R1
// because R1 keeps lengths. Everything is computed in double and rounded once per step; one layer
// at a time.
//
// Source:  QuaRot (arXiv 2404.00456) section 4; SpinQuant (arXiv 2405.16406) for R2. QuaRot's code
//          also subtracts the mean of each embedding row: wrong under RMSNorm, not done here.
// Threads: rows are cut into fixed tiles over `pool`; results do not depend on its size
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "worker/kernels/thread_pool.h"
#include "worker/rotate/rotation.h"
#include "worker/tensor/matrix.h"

namespace walsh::rotate {

// W ← W · diag(norm) · R; `norm` [in] or empty (ones).
void RotateReader(Matrix& weights, std::span<const float> norm, const Rotation& rotation,
                  ThreadPool& pool);
// W ← Rᵀ · W and b ← Rᵀ · b; `bias` [out] or empty.
void RotateWriter(Matrix& weights, std::vector<float>& bias, const Rotation& rotation,
                  ThreadPool& pool);
// The same per head of `rotation.width()` outputs: R2 on v.
void RotateHeadOutputs(Matrix& weights, std::vector<float>& bias, const Rotation& rotation,
                       ThreadPool& pool);
// W ← W · diag(R, …, R) over heads of `rotation.width()` inputs: R2 on o.
void RotateHeadInputs(Matrix& weights, const Rotation& rotation, ThreadPool& pool);

// One decoder layer's float weights, owned by the caller. Norms are emptied once folded; biases
// may be empty.
struct LayerWeights {
  std::vector<float>& input_norm;
  std::vector<float>& post_attention_norm;
  Matrix& q;
  Matrix& k;
  Matrix& v;
  Matrix& o;
  Matrix& gate;
  Matrix& up;
  Matrix& down;
  std::vector<float>& v_bias;
  std::vector<float>& o_bias;
  std::vector<float>& down_bias;
};
// `r1` of width hidden; `r2` of width head_dim (identity: none). With identities this folds the
// norms only.
void FoldLayer(const LayerWeights& layer, const Rotation& r1, const Rotation& r2, ThreadPool& pool);

}  // namespace walsh::rotate
