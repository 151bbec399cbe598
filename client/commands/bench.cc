#include "client/commands/bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/load_summary.h"
#include "client/resource_name.h"
#include "client/terminal/interrupts.h"
#include "client/terminal/load_report.h"
#include "common/command_line.h"
#include "common/limits.h"
#include "common/status_macros.h"

namespace walsh::client {
namespace {

constexpr int kOpenLoopConcurrency = 256;
constexpr int kConcurrencyMax = 4096;  // threads of this process
constexpr int64_t kRequestsPerStream = 4;
constexpr int64_t kRequestsMin = 16;
constexpr int64_t kRequestsMax = 1'000'000;

// What prompts are made of: common words, so that any tokenizer gives a few dozen ids.
constexpr char kAlphabetText[] =
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix five dozen jugs "
    "of liquor; a river runs through the old town, and in winter its people write long letters "
    "about music, bread, stars, numbers, machines, gardens, ships and the weather.";

struct Vocabulary {
  std::vector<int32_t> alphabet;
  int context = 0;  // tokens of prompt and output together
};

absl::StatusOr<Vocabulary> ReadVocabulary(Client& client, const std::string& model) {
  v1::TokenizeRequest request;
  request.set_model(model);
  request.set_text(kAlphabetText);
  WALSH_ASSIGN_OR_RETURN(const v1::TokenizeResponse response, client.Tokenize(request));
  Vocabulary vocabulary{.alphabet = {response.token_ids().begin(), response.token_ids().end()},
                        .context = response.max_model_len()};
  std::sort(vocabulary.alphabet.begin(), vocabulary.alphabet.end());
  vocabulary.alphabet.erase(std::unique(vocabulary.alphabet.begin(), vocabulary.alphabet.end()),
                            vocabulary.alphabet.end());
  if (vocabulary.alphabet.empty()) {
    return absl::FailedPreconditionError("the model's tokenizer makes nothing of plain English");
  }
  return vocabulary;
}

absl::Status CheckFits(const BenchFlags& flags, const Vocabulary& vocabulary) {
  const int n_tokens = flags.prompt_tokens + flags.output_tokens;
  if (vocabulary.context == 0 || n_tokens <= vocabulary.context) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--prompt-tokens and --output-tokens are ",
                                                 n_tokens, " together, the model's context is ",
                                                 vocabulary.context));
}

v1::GenerateRequest MakeRequest(const BenchFlags& flags, const std::vector<int32_t>& prompt,
                                int64_t index) {
  v1::GenerateRequest request;
  request.set_model(ResourceId(flags.model));
  *request.mutable_token_ids()->mutable_ids() = {prompt.begin(), prompt.end()};
  v1::SamplingParams& sampling = *request.mutable_sampling();
  sampling.set_max_tokens(flags.output_tokens);
  sampling.set_temperature(flags.temperature);
  sampling.set_seed(flags.seed + static_cast<uint64_t>(index));
  sampling.set_ignore_eos(!flags.stop_at_eos);
  return request;
}

absl::StatusOr<LoadResult> RunLoad(const BenchFlags& flags, const LoadOptions& options,
                                   const Vocabulary& vocabulary, Client& client,
                                   Interrupts& interrupts) {
  // Prompts from `first` on.
  const auto run = [&](const LoadOptions& load, int64_t first) {
    const SendRequest send = [&](int64_t i, RequestRecorder& recorder, Cancellation& stop) {
      const int64_t index = first + i;
      const v1::GenerateRequest request =
          MakeRequest(flags, BenchPrompt(flags, vocabulary.alphabet, index), index);
      return client.GenerateStream(
          request,
          [&recorder](const v1::GenerateStreamResponse& event) {
            if (event.has_started()) recorder.SetPromptTokens(event.started().prompt_tokens());
            if (event.has_delta()) recorder.OnTokens(event.delta().token_ids_size());
          },
          &stop);
    };
    LoadGenerator generator(load, Clock::Real());
    interrupts.OnNext([&generator] { generator.Stop(); });
    absl::StatusOr<LoadResult> result = generator.Run(send);
    interrupts.OnNext(nullptr);
    return result;
  };
  if (flags.warmup > 0) {
    // With prompts of its own: no cache may know those that are measured.
    WALSH_ASSIGN_OR_RETURN(const LoadResult warmup,
                           run({.concurrency = std::min(flags.warmup, options.concurrency),
                                .n_requests = flags.warmup},
                               options.n_requests));
    for (const RequestRecord& request : warmup.requests) {
      // What fails alone would fail under load.
      WALSH_RETURN_IF_ERROR(request.status);
    }
    if (warmup.is_stopped) return absl::CancelledError("stopped before the load");
  }
  return run(options, 0);
}

int RunBench(const BenchFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  ClientOptions client_options = MakeClientOptions(global);
  client_options.attempts_max = 1;  // a refusal is a result
  Client client(client_options);
  const auto options = MakeLoadOptions(flags);
  if (!options.ok()) return Fail(options.status());
  const auto vocabulary = ReadVocabulary(client, ResourceId(flags.model));
  if (!vocabulary.ok()) return Fail(vocabulary.status());
  if (const absl::Status fits = CheckFits(flags, *vocabulary); !fits.ok()) return Fail(fits);
  const auto result = RunLoad(flags, *options, *vocabulary, client, interrupts);
  if (!result.ok()) return Fail(result.status());
  const LoadSummary summary = Summarize(*result);
  const LoadDescription description{.model = ResourceId(flags.model),
                                    .concurrency = options->concurrency,
                                    .rate = flags.rate,
                                    .prompt_tokens = flags.prompt_tokens,
                                    .max_tokens = flags.output_tokens,
                                    .shared_tokens = flags.shared_tokens};
  PrintOut(global.json() ? LoadJson(description, summary) : LoadReport(description, summary));
  return summary.n_done > 0 && summary.failures.empty() ? kExitOk : kExitFailed;
}

}  // namespace

absl::StatusOr<LoadOptions> MakeLoadOptions(const BenchFlags& flags) {
  if (!std::isfinite(flags.rate) || !std::isfinite(flags.seconds) ||
      !std::isfinite(flags.temperature)) {
    return absl::InvalidArgumentError("--rate, --duration and --temperature are finite numbers");
  }
  if (flags.shared_tokens >= flags.prompt_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--shared-prefix is ", flags.shared_tokens,
                                                   ", less than the ", flags.prompt_tokens,
                                                   " of --prompt-tokens, so that prompts differ"));
  }
  LoadOptions options{.concurrency = flags.concurrency, .rate = flags.rate, .seed = flags.seed};
  if (options.concurrency == 0) options.concurrency = flags.rate > 0 ? kOpenLoopConcurrency : 1;
  options.n_requests = flags.requests;
  if (options.n_requests == 0) {
    options.n_requests = std::max(kRequestsMin, kRequestsPerStream * options.concurrency);
  }
  if (flags.seconds > 0) {
    options.duration_max = absl::Seconds(flags.seconds);
    if (flags.requests == 0) options.n_requests = kRequestsMax;
  }
  return options;
}

std::vector<int32_t> BenchPrompt(const BenchFlags& flags, const std::vector<int32_t>& alphabet,
                                 int64_t index) {
  std::vector<int32_t> prompt;
  const auto draw = [&](uint64_t stream, int n_tokens) {
    std::seed_seq seeds{flags.seed, stream};
    std::mt19937_64 random(seeds);
    for (int i = 0; i < n_tokens; ++i) prompt.push_back(alphabet[random() % alphabet.size()]);
  };
  draw(0, flags.shared_tokens);
  draw(static_cast<uint64_t>(index) + 1, flags.prompt_tokens - flags.shared_tokens);
  return prompt;
}

void AddBenchCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App& command = *app.add_subcommand(
      "bench", "Send requests to a loaded model and measure rates and waiting times");
  command.add_option("NAME", flags->model, "A loaded model")->required();
  command
      .add_option("--concurrency", flags->concurrency,
                  "Streams at once: each sends its next request when its last has ended; with "
                  "--rate the most there may be. 0 means 1, with --rate 256")
      ->check(CLI::Range(0, kConcurrencyMax));
  command
      .add_option("--rate", flags->rate,
                  "Requests a second, arriving at random (Poisson) whatever the service does; 0 "
                  "means a closed loop")
      ->check(CLI::Range(0.0, 1e6));
  command
      .add_option("--requests", flags->requests,
                  "Requests in all; 0 means 4 for each stream and at least 16, or as many as "
                  "--duration has room for")
      ->check(CLI::Range(int64_t{0}, kRequestsMax));
  command
      .add_option("--duration", flags->seconds,
                  "Seconds after which nothing more is sent; 0 means no limit")
      ->check(CLI::Range(0.0, 1e6));
  command.add_option("--warmup", flags->warmup, "Requests before, which are not counted")
      ->check(CLI::Range(0, kConcurrencyMax))
      ->capture_default_str();
  command.add_option("--prompt-tokens", flags->prompt_tokens, "Tokens of each prompt")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      .add_option("--shared-prefix", flags->shared_tokens,
                  "Tokens with which all prompts begin alike, for caches of prefixes")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--output-tokens", flags->output_tokens, "Tokens of each answer")
      ->check(CLI::Range(1, limits::kNewTokensMax))
      ->capture_default_str();
  command.add_option("--temperature", flags->temperature, "0 is greedy")
      ->check(CLI::Range(0.0, limits::kTemperatureMax))
      ->capture_default_str();
  command.add_flag("--stop-at-eos", flags->stop_at_eos,
                   "Answers may end early; otherwise each has all its tokens");
  command.add_option("--seed", flags->seed, "Of prompts, arrivals and sampling")
      ->capture_default_str();
  command.callback([flags, &global, &chosen] {
    chosen = [flags, &global] { return RunBench(*flags, global); };
  });
}

}  // namespace walsh::client
