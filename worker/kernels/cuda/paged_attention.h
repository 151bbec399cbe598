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
// fixed number of tokens from the sequence's start, and what pieces give is added up in their
// order. The two operations differ from one another in the last bits.
//
// Keys and values of the batch's rows must be in the pool (QkvToCache). Nothing is read of blocks
// and tokens that no row sees, and rows of no sequence are not written.
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

namespace walsh::kernels::cuda {

struct PagedAttentionParams {
  KvBatch batch;
  KvPoolLayer pool;
  int64_t n_heads = 0;      // a multiple of the pool's n_kv_heads
  int64_t window = 0;       // 0: none
  float scale = 0;          // above 0; 1 / sqrt(head_dim) in most models
  const bf16* q = nullptr;  // [n_rows, n_heads · head_dim], after RoPE; aligned to 16 bytes
  int64_t q_stride = 0;     // 0: n_heads · head_dim; a multiple of 8
  bf16* y = nullptr;        // likewise
  int64_t y_stride = 0;
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};

// Whether attention is compiled for heads of this size.
bool IsPagedHeadDim(int64_t head_dim);

// Tokens of a piece of PagedDecodeAttention's. Fixed, since it is part of the order of summation:
// large enough that what is written and read again of a piece is 1 % of what is read for it, small
// enough that the few heads of one short sequence fill the device.
inline constexpr int64_t kDecodePieceTokens = 128;

// Pieces of a sequence whose row sees `n_past` tokens and itself.
__host__ __device__ constexpr int64_t DecodePieces(int64_t n_past, int64_t window) {
  const int64_t first = window > 0 && n_past + 1 > window ? n_past + 1 - window : 0;
  return n_past / kDecodePieceTokens - first / kDecodePieceTokens + 1;
}

// Memory of PagedDecodeAttention beside its tensors. It serves one launch at a time.
struct PagedDecodeWorkspace {
  // Σ of DecodePieces over the batch, at most. Sequences that would need more are left out, their
  // rows unwritten: the caller, who knows the lengths, must not let it come to that.
  int64_t n_pieces_max = 0;
  float* partials = nullptr;    // [PagedDecodePartials(…)], aligned to 16 bytes
  int32_t* counters = nullptr;  // [PagedDecodeCounters(…)], zeros at first and after each launch
};
int64_t PagedDecodePartials(int64_t n_pieces_max, int64_t n_heads, const KvPoolShape& pool);
int64_t PagedDecodeCounters(int64_t n_sequences, int64_t n_heads, const KvPoolShape& pool);

// One row of each sequence that has rows, the first of them. One launch of a grid that depends on
// sizes in the arguments alone, so that a graph may be replayed with other lengths.
//
// A CTA takes a piece and all query heads of a kv head, so that keys and values are read once; the
// CTA that finishes last of a sequence and kv head adds up the pieces.
//
// Bound:   memory: 4 · head_dim · n_kv_heads bytes for each token that is seen
absl::Status PagedDecodeAttention(const PagedAttentionParams& params,
                                  const PagedDecodeWorkspace& workspace);

// All rows of all sequences, in one launch. A CTA takes up to 128 pairs of a row and a query head
// of one kv head, and keys and values 64 tokens at a time.
//
// Bound:   tensor cores: 4 · head_dim · n_heads flop for each row and token that it sees
absl::Status PagedPrefillAttention(const PagedAttentionParams& params);

}  // namespace walsh::kernels::cuda
