// Activations in bf16 as LowBitGemm (worker/kernels/cuda/low_bit_gemm.h) reads them, and how rows
// become that.
//
// Columns are cut into pieces of 64, and a piece holds those columns of all tokens, one token's 128
// bytes after another's, so that one copy brings what a CTA multiplies. Within 128 bytes the
// columns stand as tensor cores read them from shared memory:
//
//   - of 16 columns the even ones come first, then the odd ones: a lane's four neighbouring codes
//     (serving_codes.h) are those of k = 2q, 2q + 1, 2q + 8, 2q + 9 of a product
//   - the 16 bytes c of token t stand at c ^ (t % 8) (wgmma.cuh)
//
// Columns are filled up with zeros to a multiple of 128. Tokens up to `capacity` may hold anything:
// a token's products read its own numbers only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

struct TokenTiles {
  __nv_bfloat16* data = nullptr;  // [cols / 64, capacity, 64], aligned to 128 bytes
  int64_t capacity = 0;           // tokens, a multiple of 8
  int64_t cols = 0;
};
inline constexpr int64_t kTokenTilesCapacityMax = int64_t{1} << 20;
// The least multiple of 8, and elements of `data`.
int64_t TokenTilesCapacity(int64_t n_tokens);
int64_t TokenTilesSize(int64_t capacity, int64_t cols);
// INVALID_ARGUMENT names the operation and what is wrong with its tiles: no or unaligned data, a
// capacity that is no multiple of 8 or above the limit, columns that are no multiple of 8.
absl::Status CheckTokenTiles(const char* operation, const TokenTiles& tiles);

// tiles = f(x), where f may be, in this order: RMSNorm, columns in another order, blocks of them
// times the orthonormal Hadamard matrix. Computed in fp32 and rounded to bf16 once.
//
// Bound:   memory
// Errors:  INVALID_ARGUMENT  sizes or alignments that do not fit, named with their limit
// Threads: safe; asynchronous on `stream`, allocates nothing
struct MakeTokenTilesParams {
  int64_t n_tokens = 0;
  TokenTiles tiles;  // of at least n_tokens
  // One of the two, [n_tokens, cols], aligned to 16 bytes; cols a multiple of 8.
  const __nv_bfloat16* x = nullptr;
  const float* x_float = nullptr;
  // norm_weight * x / sqrt(mean(x^2) + eps)
  bool has_norm = false;
  const float* norm_weight = nullptr;  // [cols], aligned to 16 bytes, or null: ones
  float eps = 0;
  const int32_t* input_order = nullptr;  // [cols]: column c is x[input_order[c]]; null: x[c]
  int64_t rotation_block = 0;            // as IsLowBitRotation says; 0: none
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
absl::Status MakeTokenTiles(const MakeTokenTilesParams& params);

}  // namespace walsh::kernels::cuda
