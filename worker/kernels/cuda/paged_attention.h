// Causal grouped-query attention of a batch's rows against the paged KV pool (paged_kv.h).
//
//   y[row, h] = Σ_j softmax_j(scale · q[row, h] · k[j]) v[j] over the tokens j of the row's
//   sequence that it sees: itself and those before it, or the last `window` of these.
//
// Products are of bf16 with fp32 sums on the tensor cores (mma.sync, from compute 8.0 on); maxima,
// weights and sums of the softmax are fp32, weights enter the product with the values as bf16.
//
// A row's result has the same bits whatever else the batch holds, however the sequence's rows were
// cut into batches, and from run to run: tokens are taken in pieces that begin at multiples of a
// fixed number of tokens from the sequence's start, and what pieces give is added up in an order
// that the row's position alone decides. The two operations differ from one another in the last
// bits.
//
// Nothing is read of blocks and tokens that no row sees, and rows of no sequence are not written.
//
// Source:  Dao 2023, "FlashAttention-2" (arXiv 2307.08691), algorithm 1; splitting a context over
//          CTAs and merging as "Flash-Decoding for long-context inference" (Dao et al. 2023)
// Errors:  INVALID_ARGUMENT  a head_dim that is not compiled, sizes or alignments that do not fit;
//                            named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/qkv_transform.h"

namespace walsh::kernels::cuda {

// Whether attention is compiled for heads of this size.
bool IsPagedHeadDim(int64_t head_dim);

struct PagedDecodeParams {
  KvBatch batch;
  KvPoolLayer pool;
  int64_t n_heads = 0;  // a multiple of the pool's n_kv_heads
  int64_t window = 0;   // 0: none
  float scale = 0;      // above 0; 1 / sqrt(head_dim) in most models
  // [n_rows, (n_heads + 2 n_kv_heads) · head_dim], the heads of q, then k's, then v's; aligned to 8
  // bytes.
  const float* qkv = nullptr;
  int64_t qkv_stride = 0;  // 0: as many as a row has; even
  QkvTransform transform;
  bf16* y = nullptr;     // [n_rows, n_heads · head_dim]; aligned to 16 bytes
  int64_t y_stride = 0;  // 0: n_heads · head_dim; a multiple of 8
  // Programmatic dependent launch: see dependent_launch.cuh. What the batch's numbers and tables
  // and the pool hold of tokens before the row's must be there before the first kernel of the chain
  // starts: it is read while the kernel before this one runs.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

// From the product with the weights of q, k and v to the attention's output in one launch, for one
// row of each sequence that has rows, the first of them: the transform, k and v into the pool with
// the bits that QkvToCache gives, attention. Its grid depends on sizes in the arguments alone, so
// that a graph may be replayed with other lengths.
//
// A cluster of 8 CTAs takes a sequence and up to 8 query heads of a kv head; keys and values are
// read once for these. Partial results stay in shared memory.
//
// Bound:   latency of a chain of loads and exchanges with few tokens; memory with many: 4 ·
// head_dim
//          · n_kv_heads bytes for each token that is seen
absl::Status PagedDecodeAttention(const PagedDecodeParams& params);

struct PagedAttentionParams {
  KvBatch batch;
  KvPoolLayer pool;     // keys and values of the batch's rows are there (QkvToCache)
  int64_t n_heads = 0;  // the rest as PagedDecodeParams'
  int64_t window = 0;
  float scale = 0;
  const bf16* q = nullptr;  // [n_rows, n_heads · head_dim], after RoPE; aligned to 16 bytes
  int64_t q_stride = 0;     // 0: n_heads · head_dim; a multiple of 8
  bf16* y = nullptr;        // likewise
  int64_t y_stride = 0;
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

// All rows of all sequences, in one launch. A CTA takes up to 128 pairs of a row and a query head
// of one kv head, and keys and values 64 tokens at a time.
//
// Bound:   tensor cores: 4 · head_dim · n_heads flop for each row and token that it sees
absl::Status PagedPrefillAttention(const PagedAttentionParams& params);

}  // namespace walsh::kernels::cuda
