// Text that the model writes itself, for calibration without a corpus.
//
// Documents start from the model's start token, are sampled at temperature 1 in a batch, end at EOS
// or 512 tokens, and follow one another. Such text is drawn from the distribution that the
// quantized model is to keep (LLM-QAT, arXiv 2305.17888, generates its training data likewise).
// Each document has its own random sequence, from the seed and its number, and their order is that
// of their start: the ids depend neither on threads nor on time.
//
// Errors:  INVALID_ARGUMENT  the model has no start token
//          DATA_LOSS         non-finite logits
//          and what `progress` returns
// Memory:  the key-value caches of at most 32 documents, bounded to 1 GiB beyond one document
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/loaded_model.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::calibrate {

inline constexpr int64_t kSelfDocumentTokensMax = 512;

// Called after each step with the tokens so far; a status that is not OK ends the generation.
using TokenProgress = std::function<absl::Status(int64_t n_tokens)>;

// Exactly `n_tokens` ids.
absl::StatusOr<std::vector<int32_t>> GenerateText(const engine::LoadedModel& model,
                                                  int64_t n_tokens, uint64_t seed, ThreadPool& pool,
                                                  const TokenProgress& progress);

// How many documents are generated side by side.
int64_t SelfTextBatch(const ModelConfig& config, int64_t n_tokens);

}  // namespace walsh::calibrate
