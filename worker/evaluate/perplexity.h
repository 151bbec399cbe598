// Perplexity over windows of tokens, by layers, and the divergence of one model from another.
//
// All windows go through one layer before the next is read, so that a model of any size needs the
// memory of one layer, of the windows' hidden states and of the head. Windows are independent: no
// state is carried from one to the next, and the first token of each is not predicted (the
// convention of GPTQ and QuaRot for WikiText-2; windows do not overlap).
//
// Two models are compared logit row by logit row, as
//
//   KL(original ‖ quantized) = Σ p (log p − log q)     mean over the predicted tokens
//   top-1 agreement          = share of them whose likeliest next token is the same
//
// To have both models' logits of one token at a time and never those of all, the hidden states of
// both wait before their heads.
//
// Units:   losses and divergence in nats per predicted token
// Errors:  DATA_LOSS         a non-finite loss; the message names the window
//          INVALID_ARGUMENT  models whose vocabularies differ
//          and what the source or `progress` returns
// Memory:  a model's FinalStates: hidden states of all windows and the head, in floats; to compare,
//          of both; and kLogitRows rows of logits of each
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/layer_source.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::evaluate {

struct WindowLosses {
  std::vector<double> losses;    // mean of each window
  std::vector<double> n_scored;  // predicted tokens of each
  int64_t n_tokens = 0;          // predicted, of all
  void Append(const WindowLosses& more);
  // Mean over the predicted tokens of what has a mean for each window; 0 without windows. The first
  // of overlapping windows predicts more tokens than the others.
  double TokenMean(std::span<const double> window_means) const;
  double Perplexity() const;  // exp of that of the losses; 0 without windows
};

// Called with the share that is done, 0 … 1, after each batch of rows through a layer and after
// each kLogitRows through a head.
using Progress = std::function<absl::Status(double fraction)>;

absl::StatusOr<WindowLosses> EvaluateWindows(LayerSource& source,
                                             const calibrate::TokenWindows& windows,
                                             ThreadPool& pool, const Progress& progress);

// The windows through a model's layers, up to what its head multiplies.
struct FinalStates {
  Matrix hidden;                  // [tokens of all windows, hidden]
  std::vector<float> final_norm;  // [hidden]; empty: ones
  Matrix head;                    // [vocab, hidden]
};
absl::StatusOr<FinalStates> ForwardToHead(LayerSource& source,
                                          const calibrate::TokenWindows& windows, ThreadPool& pool,
                                          const Progress& progress);

struct Comparison {
  WindowLosses reference, model;
  std::vector<double> divergences;  // mean of each window
  int64_t n_agreeing = 0;           // predicted tokens with the same likeliest one
  double KlDivergence() const;      // mean over the predicted tokens; 0 without windows
  double Top1Agreement() const;     // 0 without windows
};

// What is scored of some windows of a text.
struct ScoredFrom {
  // First predicted position of each, from 1; what is before it was predicted in the window before,
  // which overlaps. Empty: 1 for all.
  std::span<const int64_t> positions;
  int64_t first_window = 0;  // the number of the first among all the text's, for messages
};

int64_t FirstScored(const ScoredFrom& scored_from, int64_t window);

// Losses of one model, or of two and their divergence. `config` is that of the (second) model; of
// the reference only the width and the epsilon of its norm may differ.
absl::StatusOr<WindowLosses> Losses(const ModelConfig& config, const FinalStates& states,
                                    const calibrate::TokenWindows& windows,
                                    const ScoredFrom& scored_from, ThreadPool& pool,
                                    const Progress& progress);
absl::StatusOr<Comparison> Compare(const ModelConfig& reference_config,
                                   const FinalStates& reference, const ModelConfig& config,
                                   const FinalStates& states,
                                   const calibrate::TokenWindows& windows,
                                   const ScoredFrom& scored_from, ThreadPool& pool,
                                   const Progress& progress);

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
