// Proof that the rotated model is the same function, before anything is quantized.
//
// Runs a few short windows through the original and the folded, rotated weights side by side in
// floats and compares all logits. Both models stream layer by layer: a layer is loaded once, used
// as it is, then rotated and used again. Rounding gives 1e-6 to 5e-6 (docs/quality.md), one linear
// that is turned once too often more than 1e-2 (RotatedForwardTest); 1e-4 tells them apart.
//
// Errors:  FAILED_PRECONDITION  the logits differ by more; the message has figure and limit
//          DATA_LOSS            non-finite logits
//          and what the checkpoint or `progress` returns
#pragma once

#include <functional>

#include "absl/status/statusor.h"
#include "worker/calibrate/token_windows.h"
#include "worker/pipeline/rotated_source.h"
#include "worker/tensor/matrix.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::pipeline {

inline constexpr double kRotationGateMax = 1e-4;

// Four windows of at most 32 tokens of a fixed text.
inline constexpr int64_t kGateTokensMax = 4 * 32;
absl::StatusOr<calibrate::TokenWindows> GateWindows(const ModelConfig& config,
                                                    const Tokenizer& tokenizer);

// The gate itself: max |Δ logit| / max |logit| of the same rows before and after the rotation.
absl::StatusOr<double> CompareLogits(const Matrix& logits, const Matrix& rotated_logits);

// The same for who has found max |logit| and max |Δ logit|, or a logit that is not finite.
absl::StatusOr<double> JudgeDifference(double largest, double difference);
absl::Status NotFiniteLogit(int64_t token, int64_t id, double before, double after);

// The same of whole models, on the CPU. `progress` is called after each layer.
absl::StatusOr<double> CheckRotation(const Checkpoint& checkpoint, RotatedSource& rotated,
                                     const calibrate::TokenWindows& windows, ThreadPool& pool,
                                     const std::function<absl::Status()>& progress);

}  // namespace walsh::pipeline
