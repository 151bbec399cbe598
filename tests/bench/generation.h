// Requests on an engine of this process, with the time at which each token came.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/engine/engine.h"
#include "worker/engine/served_model.h"

namespace walsh::bench {

struct Generation {
  std::vector<int32_t> tokens;
  std::vector<double> token_seconds;  // on the steady clock
  engine::Outcome outcome;
};

// Exactly `n_tokens` ids of English text, which differ by `index`.
absl::StatusOr<std::vector<int32_t>> MakePrompt(const engine::ServedModel& model, int64_t n_tokens,
                                                int index);

// Greedy and to the last token, so that every run does the same work.
engine::SamplingOptions FixedLength(int max_tokens);

// Submits one request for each prompt at once and waits for all; the first failure otherwise.
absl::StatusOr<std::vector<Generation>> GenerateAll(
    engine::Engine& engine, const std::vector<std::vector<int32_t>>& prompts, int max_tokens);

}  // namespace walsh::bench
