// walsh bench: what a loaded model's service gives under a chosen load.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/commands/command.h"
#include "client/load_generator.h"

namespace walsh::client {

struct BenchFlags {
  std::string model;
  int concurrency = 0;  // 0: 1 in a closed loop, 256 with a rate
  double rate = 0;
  int64_t requests = 0;  // 0: 4 for each stream, at least 16
  double seconds = 0;    // 0: no limit
  int warmup = 1;
  int prompt_tokens = 512;
  int shared_tokens = 0;
  int output_tokens = 256;
  double temperature = 0;
  bool stop_at_eos = false;
  uint64_t seed = 0;
};

// INVALID_ARGUMENT for values that make no load.
absl::StatusOr<LoadOptions> MakeLoadOptions(const BenchFlags& flags);
// The prompt of request `index`: `shared_tokens` that all have and then its own, drawn from
// `alphabet` by the seed, so that a run can be repeated.
std::vector<int32_t> BenchPrompt(const BenchFlags& flags, const std::vector<int32_t>& alphabet,
                                 int64_t index);

void AddBenchCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
