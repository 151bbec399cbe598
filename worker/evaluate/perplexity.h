// Perplexity over windows of tokens, by layers.
//
// All windows go through one layer before the next is read, so that a model of any size needs the
// memory of one layer, of the windows' hidden states and of the head. Windows are independent: no
// state is carried from one to the next, and the first token of each is not predicted (the
// convention of GPTQ and QuaRot for WikiText-2; windows do not overlap).
//
// Units:   losses in nats per predicted token
// Errors:  DATA_LOSS  a non-finite loss; the message names the window
//          and what the source or `progress` returns
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/layer_source.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::evaluate {

struct WindowLosses {
  std::vector<double> losses;  // mean of each window
  int64_t n_tokens = 0;        // predicted
  double Perplexity() const;   // exp of the mean; 0 without windows
};

// Called every few hundred milliseconds with the share that is done, 0 … 1.
using Progress = std::function<absl::Status(double fraction)>;

absl::StatusOr<WindowLosses> EvaluateWindows(LayerSource& source,
                                             const calibrate::TokenWindows& windows,
                                             ThreadPool& pool, const Progress& progress);

// The pieces that calibration and the equivalence gate share with it.

// Rows of `embedding` by id: [ids, hidden].
Matrix Embed(const ModelConfig& config, const Matrix& embedding, std::span<const int32_t> ids);

// All windows of `length` rows in `hidden` through one layer, in place, some windows at a time.
// `progress` is called between batches with the rows done in all.
using RowProgress = std::function<absl::Status(int64_t n_rows)>;
absl::Status ForwardWindows(const ForwardContext& context, const DecoderLayer& layer,
                            int64_t length, Matrix& hidden, ForwardScratch& scratch,
                            const RowProgress& progress);

// Final norm and head: logits [n_rows, vocab] of contiguous hidden rows.
absl::Status Logits(const ForwardContext& context, std::span<const float> final_norm,
                    const Matrix& head, const float* hidden, int64_t n_rows, Matrix& logits);

// Rows of logits at a time: 256 × 128k vocabulary are 128 MiB.
inline constexpr int64_t kLogitRows = 256;

// How many windows of `length` go through a layer at once: about 2,048 rows.
int64_t WindowsPerBatch(int64_t length);

}  // namespace walsh::evaluate
