// Both ends of a forward pass: tokens to rows of the residual stream, logits to tokens. With both
// on the device a step's tokens go into the next step without the host. And what some families do
// to rows on their way into that stream.
//
// Bound:   memory
// Errors:  INVALID_ARGUMENT  sizes that do not fit, named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

// hidden[i, :] = scale · table[id, :] with id = ids[i], or made[−1 − ids[i]] where that is
// negative. A row whose id is not below `vocab` becomes NaN, so that ArgMax gives −1 for it once
// more.
struct EmbedRowsParams {
  int64_t n_rows = 0;
  int64_t dim = 0;  // a multiple of 8
  int64_t vocab = 0;
  const int32_t* ids = nullptr;          // [n_rows]
  const int32_t* made = nullptr;         // tokens of a step before, or null: then there are none
  const __nv_bfloat16* table = nullptr;  // [vocab, dim], aligned to 16 bytes
  float scale = 1.0f;
  float* hidden = nullptr;  // [n_rows, dim], aligned to 16 bytes
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
absl::Status EmbedRows(const EmbedRowsParams& params);

// hidden[i, :] += weight * x[i, :] / sqrt(mean(x[i, :]^2) + eps): the output of a sublayer through
// a norm of its own. The same bits for a row whatever the others are.
struct AddNormedRowsParams {
  int64_t n_rows = 0;
  int64_t dim = 0;                // a multiple of 4
  const float* x = nullptr;       // [n_rows, dim], aligned to 16 bytes like the others
  const float* weight = nullptr;  // [dim]
  float eps = 0;
  float* hidden = nullptr;  // [n_rows, dim]
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
absl::Status AddNormedRows(const AddNormedRowsParams& params);

// ids[i] = the position of the largest of logits[i, :], the lowest of equal ones; −1 where there is
// a NaN, +infinity or none above −infinity: a model's fault, not a token.
//
// Several CTAs share a row; the order in which they come does not matter to a maximum of (value,
// position).
struct ArgMaxParams {
  int64_t n_rows = 0;
  int64_t vocab = 0;
  const float* logits = nullptr;  // aligned to 16 bytes
  int64_t stride = 0;             // 0: vocab; a multiple of 4
  int32_t* ids = nullptr;         // [n_rows]
  // [2 · n_rows], zeros at first and after each launch. It serves one launch at a time.
  unsigned long long* workspace = nullptr;
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
absl::Status ArgMax(const ArgMaxParams& params);

}  // namespace walsh::kernels::cuda
