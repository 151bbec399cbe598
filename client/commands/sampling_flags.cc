#include "client/commands/sampling_flags.h"

#include "common/status_macros.h"

namespace walsh::client {

void AddSamplingFlags(CLI::App& command, SamplingFlags& flags) {
  command.add_option("--max-tokens", flags.max_tokens, "Tokens to write at most; default 256");
  command.add_option("--temperature", flags.temperature, "0 (greedy) to 2; default 1");
  command.add_option("--top-p", flags.top_p, "Nucleus of the distribution, (0, 1]");
  command.add_option("--top-k", flags.top_k, "The k likeliest tokens; 0 is off");
  command.add_option("--min-p", flags.min_p, "Share of the likeliest token's probability, [0, 1)");
  command.add_option("--seed", flags.seed, "Seed of the sampling; drawn when not given");
  // One value an occurrence, or a following positional would be taken for a stop string.
  command.add_option("--stop", flags.stop, "Ends the text before this string; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

absl::StatusOr<v1::SamplingParams> MakeSampling(const SamplingFlags& flags) {
  v1::SamplingParams sampling;
  if (flags.max_tokens) sampling.set_max_tokens(*flags.max_tokens);
  if (flags.temperature) sampling.set_temperature(*flags.temperature);
  if (flags.top_p) sampling.set_top_p(*flags.top_p);
  if (flags.top_k) sampling.set_top_k(*flags.top_k);
  if (flags.min_p) sampling.set_min_p(*flags.min_p);
  if (flags.seed) sampling.set_seed(*flags.seed);
  for (const std::string& stop : flags.stop) {
    WALSH_RETURN_IF_ERROR(CheckUtf8(stop, "stop string"));
    sampling.add_stop(stop);
  }
  return sampling;
}

}  // namespace walsh::client
