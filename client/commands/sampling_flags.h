// The sampling flags that `walsh generate` and `walsh chat` share.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/commands/command.h"
#include "walsh/v1/generation.pb.h"

namespace walsh::client {

struct SamplingFlags {
  std::optional<int> max_tokens;
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int> top_k;
  std::optional<double> min_p;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
};

void AddSamplingFlags(CLI::App& command, SamplingFlags& flags);
// Only what was given is set: the service has the defaults. INVALID_ARGUMENT for a stop string that
// is not UTF-8; ranges are the service's to check.
absl::StatusOr<v1::SamplingParams> MakeSampling(const SamplingFlags& flags);

}  // namespace walsh::client
