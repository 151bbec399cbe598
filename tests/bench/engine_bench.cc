// What the engine makes of a real artifact: tokens per second while it decodes 1, 2, 4 and 8
// requests at once, and while it reads prompts.
//
//   engine_bench [ARTIFACT] --threads 2
//
// Decode: greedy, no end token, all requests submitted at once with equally long prompts. Counted
// are the tokens between the moment when the last request had its first one and the moment when
// the first request had its last one, so that every counted step has all requests in it.
// Share: packed weights are read once for each step, whatever the number of requests; bytes per
// second of that over the machine's read bandwidth, which is measured before each run of each
// round with as many threads. Medians over rounds.
// Rounds in which other processes took CPU time are repeated (conditions.h).
// Prompts: tokens over the time from admission to the first new token, without a prefix cache.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "common/clock.h"
#include "common/command_line.h"
#include "common/status_macros.h"
#include "tests/bench/bandwidth.h"
#include "tests/bench/conditions.h"
#include "tests/bench/generation.h"
#include "tests/bench/inputs.h"
#include "worker/engine/engine.h"
#include "worker/engine/loaded_model.h"

namespace walsh::bench {
namespace {

constexpr double kShareTarget = 0.40;
constexpr int kBandwidthPasses = 5;

struct Flags {
  std::string artifact = FindArtifact();
  int threads = DefaultThreads();
  int rounds = 7;
  int seconds_max = 300;
  int tokens = 256;
  int64_t prompt = 32;
  std::vector<int> requests = {1, 2, 4, 8};
  std::vector<int64_t> prompts = {32, 128, 512, 2048};
};

class EngineBench {
 public:
  EngineBench(const Flags& flags, std::shared_ptr<engine::LoadedModel> model,
              std::unique_ptr<engine::Engine> engine)
      : flags_(flags),
        model_(std::move(model)),
        engine_(std::move(engine)),
        bandwidth_pool_(flags.threads) {}

  absl::Status Run() {
    for (const int n : flags_.requests) WALSH_RETURN_IF_ERROR(DecodeRate(n).status());  // warms up
    WALSH_ASSIGN_OR_RETURN(
        const QuietRounds<Round> quiet,
        MeasureQuietly<Round>(flags_.rounds, std::chrono::seconds(flags_.seconds_max),
                              [this] { return MeasureRound(); }));
    std::printf("%s\n", quiet.Describe().c_str());
    Print(quiet.rounds);
    return absl::OkStatus();
  }

 private:
  struct Round {
    std::vector<double> bandwidths;
    std::map<int, double> decode_rates;      // by requests
    std::map<int64_t, double> prompt_rates;  // by tokens
  };

  absl::StatusOr<Round> MeasureRound() {
    Round round;
    for (const int n : flags_.requests) {
      for (int i = 0; i < kBandwidthPasses; ++i) {
        round.bandwidths.push_back(bandwidth_.Measure(bandwidth_pool_));
      }
      WALSH_ASSIGN_OR_RETURN(round.decode_rates[n], DecodeRate(n));
    }
    for (const int64_t n : flags_.prompts) {
      WALSH_ASSIGN_OR_RETURN(round.prompt_rates[n], PromptRate(n));
    }
    return round;
  }

  absl::StatusOr<std::vector<Generation>> Generate(int n_requests, int64_t n_prompt, int n_new) {
    std::vector<std::vector<int32_t>> prompts;
    for (int i = 0; i < n_requests; ++i) {
      WALSH_ASSIGN_OR_RETURN(std::vector<int32_t> prompt, MakePrompt(*model_, n_prompt, i));
      prompts.push_back(std::move(prompt));
    }
    return GenerateAll(*engine_, prompts, n_new);
  }

  absl::StatusOr<double> DecodeRate(int n_requests) {
    WALSH_ASSIGN_OR_RETURN(const std::vector<Generation> generations,
                           Generate(n_requests, flags_.prompt, flags_.tokens));
    double start = 0;
    double end = std::numeric_limits<double>::infinity();
    for (const Generation& generation : generations) {
      start = std::max(start, generation.token_seconds.front());
      end = std::min(end, generation.token_seconds.back());
    }
    int64_t n_tokens = 0;
    for (const Generation& generation : generations) {
      n_tokens += std::count_if(generation.token_seconds.begin(), generation.token_seconds.end(),
                                [&](double at) { return at > start && at <= end; });
    }
    return static_cast<double>(n_tokens) / (end - start);
  }

  absl::StatusOr<double> PromptRate(int64_t n_prompt) {
    WALSH_ASSIGN_OR_RETURN(const std::vector<Generation> generations, Generate(1, n_prompt, 1));
    return static_cast<double>(n_prompt) / generations.front().outcome.prefill_seconds;
  }

  void Print(const std::vector<Round>& rounds) const {
    std::vector<double> bandwidths;
    std::map<int, std::vector<double>> decode_rates;
    std::map<int64_t, std::vector<double>> prompt_rates;
    for (const Round& round : rounds) {
      bandwidths.insert(bandwidths.end(), round.bandwidths.begin(), round.bandwidths.end());
      for (const auto& [n, rate] : round.decode_rates) decode_rates[n].push_back(rate);
      for (const auto& [n, rate] : round.prompt_rates) prompt_rates[n].push_back(rate);
    }
    const double read_rate = Median(bandwidths);
    const auto packed_bytes = static_cast<double>(model_->packed_bytes_per_token());
    std::printf("packed weights read for a step: %.1f MB; read bandwidth: %.2f GB/s\n\n",
                packed_bytes / 1e6, read_rate / 1e9);
    std::printf(
        "| requests | tok/s | min to max | ms a step | packed GB/s | share of bandwidth |\n");
    std::printf("| ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (const auto& [n, rates] : decode_rates) {
      const double steps = Median(rates) / n;
      std::printf("| %d | %.1f | %s | %.2f | %.2f | %.1f %% |\n", n, Median(rates),
                  Range(rates).c_str(), 1e3 / steps, steps * packed_bytes / 1e9,
                  100 * steps * packed_bytes / read_rate);
    }
    std::printf("\n| prompt tokens | tok/s | min to max |\n| ---: | ---: | ---: |\n");
    for (const auto& [n, rates] : prompt_rates) {
      std::printf("| %d | %.0f | %s |\n", static_cast<int>(n), Median(rates), Range(rates).c_str());
    }
    if (const auto one = decode_rates.find(1); one != decode_rates.end()) {
      const double share = Median(one->second) * packed_bytes / read_rate;
      std::printf(
          "\none request reads its weights at %.1f %% of the read bandwidth "
          "(target: at least %.0f %%): %s\n",
          100 * share, 100 * kShareTarget, share >= kShareTarget ? "met" : "missed");
    }
  }

  static std::string Range(const std::vector<double>& values) {
    const auto [min, max] = std::minmax_element(values.begin(), values.end());
    return absl::StrFormat("%.1f to %.1f", *min, *max);
  }

  const Flags flags_;
  const std::shared_ptr<engine::LoadedModel> model_;
  const std::unique_ptr<engine::Engine> engine_;
  ThreadPool bandwidth_pool_;
  ReadBandwidth bandwidth_;
};

absl::Status Run(const Flags& flags) {
  std::printf("%s\nprompts of %d tokens, %d new tokens, %s\n", DescribeRun(flags.threads).c_str(),
              static_cast<int>(flags.prompt), flags.tokens, flags.artifact.c_str());
  WALSH_ASSIGN_OR_RETURN(
      std::shared_ptr<engine::LoadedModel> model,
      engine::LoadedModel::LoadArtifact(flags.artifact, {.n_threads = flags.threads}));
  WALSH_ASSIGN_OR_RETURN(
      std::unique_ptr<engine::Engine> engine,
      engine::Engine::Create(
          model, {.model_name = "bench", .prefix_cache = false, .n_threads = flags.threads},
          Clock::Real()));
  return EngineBench(flags, std::move(model), std::move(engine)).Run();
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Decode and prompt speed of an artifact in the engine of this process");
  app.add_option("artifact", flags.artifact, "Artifact directory");
  app.add_option("--threads", flags.threads)->check(CLI::PositiveNumber);
  app.add_option("--rounds", flags.rounds)->check(CLI::PositiveNumber);
  app.add_option("--seconds", flags.seconds_max, "How long to try for quiet rounds");
  app.add_option("--tokens", flags.tokens, "New tokens of each request")
      ->check(CLI::Range(2, 4096));
  app.add_option("--prompt", flags.prompt, "Prompt tokens of each request that decodes")
      ->check(CLI::PositiveNumber);
  app.add_option("--requests", flags.requests, "Requests at once")
      ->delimiter(',')
      ->check(CLI::Range(1, 16));
  app.add_option("--prompts", flags.prompts, "Lengths of prompts that are only read")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  if (flags.artifact.empty()) {
    std::printf("skipped: no artifact; name one, set WALSH_BENCH_MODEL, or use ./run bench\n");
    return kExitOk;
  }
  if (const absl::Status status = Run(flags); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return kExitFailed;
  }
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
