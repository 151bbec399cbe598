// The next token of each row of logits, by the steps of worker/engine/sampler.h: penalties,
// excluded tokens, temperature, min_p, top_k, top_p and a draw at UniformAt(seed, position), in the
// order of ids. So the device draws the token that the CPU draws, but where the number falls so
// near to the boundary of two tokens that rounding decides.
//
// The CTAs of a cluster share a row. Weights are summed as integers, so that a row's token is the
// same in every run and whatever other rows there are; thresholds are found digit by digit in
// histograms over all the logits, so that nothing depends on how many are kept.
//
// Bound:   latency: some passes over a row that lies in the cache, each with a barrier of the
// cluster Errors:  INVALID_ARGUMENT  sizes that do not fit, named with their limit Threads: safe;
// asynchronous on `stream`, allocates nothing
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::kernels::cuda {

// A token of a sequence's prompt or output.
struct SeenToken {
  int32_t token = 0;
  int32_t n_output = 0;  // how often it is in the output
};

// What a row's token is chosen by. It lies in device memory, so that a captured launch can be
// replayed with another; as it is here it makes the largest logit the token.
struct SampleRow {
  double temperature = 0;  // 0: the largest
  double top_p = 1;        // below 1: the smallest set of that mass
  double min_p = 0;        // above 0: none of less than this share of the largest probability
  double repetition_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  uint64_t seed = 0;
  uint64_t position = 0;  // tokens generated so far
  int32_t top_k = 0;      // 0: off
  // The penalized tokens, each once, in SampleRowsParams::seen.
  int64_t first_seen = 0;
  int32_t n_seen = 0;
  // Of these, the one that becomes `changed` first, and stays it; −1: none.
  int32_t changed_seen = -1;
  SeenToken changed = {};
  // Where SampleRowsParams::made has a token that is in the output once more than `seen` says; −1:
  // nowhere. `seen` stays as it is.
  int32_t uncounted = -1;
  // Tokens that must not be chosen, in SampleRowsParams::excluded.
  int32_t first_excluded = 0;
  int32_t n_excluded = 0;
  // −1: no log-probabilities; otherwise the token's, and of so many of the most probable, at most
  // kTopLogprobsMax.
  int32_t n_top_logprobs = -1;
};

inline constexpr int64_t kSampleVocabMax = int64_t{1} << 20;
inline constexpr int32_t kTopLogprobsMax = 20;
// In place of an id.
inline constexpr int32_t kNotFinite = -1;    // a NaN, +infinity, or nothing above −infinity
inline constexpr int32_t kNoTokenLeft = -2;  // nothing above −infinity after the exclusions

struct SampleRowsParams {
  int64_t n_rows = 0;
  int64_t vocab = 0;  // at most kSampleVocabMax
  // Rows with seen or excluded tokens are overwritten. Aligned to 16 bytes.
  float* logits = nullptr;
  int64_t stride = 0;                 // 0: vocab; a multiple of 4
  const SampleRow* rows = nullptr;    // [n_rows]
  SeenToken* seen = nullptr;          // ids outside the vocabulary are passed over, here and below
  const int32_t* excluded = nullptr;  // or null where no row has any, as `seen`
  float* seen_logits = nullptr;       // a place for each of `seen`, for rows with log-probabilities
  const int32_t* made = nullptr;      // tokens of a launch before; apart from ids
  int32_t* ids = nullptr;             // [n_rows]
  // Of the logits before the penalties, where a row asks for them; otherwise nothing is written.
  float* logprobs = nullptr;   // [n_rows], of the token
  int32_t* top_ids = nullptr;  // [n_rows, kTopLogprobsMax], most probable first, then lowest ids;
  float* top_logprobs = nullptr;  // as many as the row asks for and the vocabulary has
  // Programmatic dependent launch: see dependent_launch.cuh.
  bool overlap_previous = false;
  cudaStream_t stream = nullptr;
};
// Needs a device of compute 9.0 or later.
absl::Status SampleRows(const SampleRowsParams& params);

}  // namespace walsh::kernels::cuda
