// What gRPC takes of the engine's tokens per second, and how soon a cancelled request leaves.
//
//   service_bench [ARTIFACT] --threads 2
//
// The same greedy requests of fixed length go four ways, in turns, in one run:
//   engine       the engine of this process, called in process
//   gRPC         GenerateStream over loopback to the worker's service in this process, in front of
//                that same engine
//   worker       GenerateStream to a walsh-worker process
//   coordinator  GenerateStream to a walsh-coordinator process, which passes it on to that worker
// Every way has to bring the same tokens. Rounds in which other processes took CPU time are
// repeated (conditions.h). Each round takes every way once, from another one on each time; a way's
// overhead is its time over that of the engine in the same round, less one, and the table has the
// median over rounds. Times are wall time from the request to the last token, prompt included. All
// engines have as many threads; those that wait use no CPU. The CPU time is that of this process:
// for the last two ways the client's alone.
//
// Cancels: as many requests as in the last comparison stream through the coordinator; once each has
// brought some tokens they are cancelled by their client one after the other, each when the one
// before has left. The time is from the call of Cancel to the first answer of the worker's metrics
// that shows one running request less, asked for without a pause; a step is what the others' tokens
// take meanwhile, before the first cancel.
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/client.h"
#include "common/clock.h"
#include "common/command_line.h"
#include "common/grpc_cancellation.h"
#include "common/grpc_server.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/bench/bandwidth.h"
#include "tests/bench/binaries.h"
#include "tests/bench/conditions.h"
#include "tests/bench/generation.h"
#include "tests/bench/inputs.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/wait.h"
#include "worker/engine/loaded_model.h"
#include "worker/service/generation_service.h"
#include "worker/service/model_store.h"

namespace walsh::bench {
namespace {

namespace fs = std::filesystem;

constexpr double kOverheadTarget = 0.05;
constexpr char kModelId[] = "bench";

using Tokens = std::vector<int32_t>;

struct Flags {
  std::string artifact = FindArtifact();
  int threads = DefaultThreads();
  int rounds = 9;
  int seconds_max = 300;
  int tokens = 256;
  int64_t prompt = 32;
  std::vector<int> streams = {1, 8};
  double stream_interval_ms = limits::kStreamIntervalMsDefault;
};

// The worker's service in this process, on a free port.
class LocalService {
 public:
  static absl::StatusOr<std::unique_ptr<LocalService>> Start(const std::string& models_dir,
                                                             int n_threads,
                                                             absl::Duration stream_interval) {
    auto service = std::make_unique<LocalService>();
    service::ModelStore::Options options;
    options.root = models_dir;
    options.worker_id = "w-bench";
    options.engine.n_threads = n_threads;
    options.loader = [n_threads](const std::string& directory) {
      return engine::LoadedModel::LoadArtifact(directory, {.n_threads = n_threads});
    };
    WALSH_ASSIGN_OR_RETURN(service->models_,
                           service::ModelStore::Open(std::move(options), Clock::Real()));
    WALSH_RETURN_IF_ERROR(service->models_->Load(kModelId).status());
    WALSH_ASSIGN_OR_RETURN(service->engine_, service->models_->FindEngine(kModelId));
    service->generation_ = std::make_unique<service::GenerationService>(
        service->models_.get(), Clock::Real(),
        service::GenerationService::Options{.stream_interval = stream_interval});
    grpc::ServerBuilder builder;
    ApplyServerLimits(builder);
    AddServerInterceptors(builder);
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service->generation_.get());
    service->server_ = builder.BuildAndStart();
    if (service->server_ == nullptr) return absl::UnavailableError("cannot listen on loopback");
    service->address_ = absl::StrCat("127.0.0.1:", port);
    return service;
  }
  ~LocalService() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  engine::Engine& engine() { return *engine_; }
  const std::string& address() const { return address_; }

 private:
  std::unique_ptr<service::ModelStore> models_;
  std::shared_ptr<engine::Engine> engine_;
  std::unique_ptr<service::GenerationService> generation_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

// One way that a request can go.
struct Way {
  std::string name;
  // Generates for all prompts at once; `n_messages` counts the messages with tokens.
  std::function<absl::StatusOr<std::vector<Tokens>>(const std::vector<Tokens>& prompts,
                                                    int max_tokens, std::atomic<int>& n_messages)>
      generate;
};

// `on_tokens` is told how many each message brings.
absl::StatusOr<Tokens> StreamOne(client::Client& client, const Tokens& prompt, int max_tokens,
                                 const std::function<void(int)>& on_tokens,
                                 Cancellation* cancellation = nullptr) {
  v1::GenerateRequest request;
  request.set_model(absl::StrCat("models/", kModelId));
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_ignore_eos(true);
  Tokens tokens;
  WALSH_RETURN_IF_ERROR(client.GenerateStream(
      request,
      [&](const v1::GenerateStreamResponse& event) {
        if (!event.has_delta()) return;
        on_tokens(event.delta().token_ids_size());
        tokens.insert(tokens.end(), event.delta().token_ids().begin(),
                      event.delta().token_ids().end());
      },
      cancellation));
  return tokens;
}

Way OverGrpc(std::string name, client::Client* client) {
  return {std::move(name),
          [client](const std::vector<Tokens>& prompts, int max_tokens,
                   std::atomic<int>& n_messages) -> absl::StatusOr<std::vector<Tokens>> {
            std::vector<absl::StatusOr<Tokens>> answers(prompts.size());
            std::vector<std::thread> threads;
            for (size_t i = 0; i < prompts.size(); ++i) {
              threads.emplace_back([&, i] {
                answers[i] = StreamOne(*client, prompts[i], max_tokens, [&](int) { ++n_messages; });
              });
            }
            for (std::thread& thread : threads) thread.join();
            std::vector<Tokens> all;
            for (absl::StatusOr<Tokens>& answer : answers) {
              WALSH_RETURN_IF_ERROR(answer.status());
              all.push_back(*std::move(answer));
            }
            return all;
          }};
}

Way InProcess(engine::Engine* engine) {
  return {"engine",
          [engine](const std::vector<Tokens>& prompts, int max_tokens,
                   std::atomic<int>& n_messages) -> absl::StatusOr<std::vector<Tokens>> {
            WALSH_ASSIGN_OR_RETURN(const std::vector<Generation> generations,
                                   GenerateAll(*engine, prompts, max_tokens));
            std::vector<Tokens> all;
            for (const Generation& generation : generations) {
              n_messages += static_cast<int>(generation.tokens.size());
              all.push_back(generation.tokens);
            }
            return all;
          }};
}

class Comparison {
 public:
  Comparison(const Flags& flags, std::vector<Way> ways) : flags_(flags), ways_(std::move(ways)) {}

  absl::Status Run(const std::vector<Tokens>& prompts) {
    for (size_t w = 0; w < ways_.size(); ++w) WALSH_RETURN_IF_ERROR(Turn(w, prompts).status());
    WALSH_ASSIGN_OR_RETURN(
        const QuietRounds<Round> quiet,
        MeasureQuietly<Round>(flags_.rounds, std::chrono::seconds(flags_.seconds_max),
                              [&] { return MeasureRound(prompts); }));
    std::printf("\n%d streams at once; %s\n", static_cast<int>(prompts.size()),
                quiet.Describe().c_str());
    Print(quiet.rounds, prompts.size());
    return absl::OkStatus();
  }

 private:
  struct Figures {
    double seconds = 0;
    double cpu_seconds = 0;
    int n_messages = 0;
  };
  using Round = std::vector<Figures>;  // by way

  absl::StatusOr<Round> MeasureRound(const std::vector<Tokens>& prompts) {
    Round round(ways_.size());
    for (size_t i = 0; i < ways_.size(); ++i) {
      const size_t w = (n_rounds_ + i) % ways_.size();
      WALSH_ASSIGN_OR_RETURN(round[w], Turn(w, prompts));
    }
    ++n_rounds_;
    return round;
  }

  absl::StatusOr<Figures> Turn(size_t w, const std::vector<Tokens>& prompts) {
    std::atomic<int> n_messages = 0;
    const double cpu_start = OwnCpuSeconds();
    const auto start = std::chrono::steady_clock::now();
    absl::StatusOr<std::vector<Tokens>> tokens =
        ways_[w].generate(prompts, flags_.tokens, n_messages);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    WALSH_RETURN_IF_ERROR(tokens.status());
    if (expected_.empty()) expected_ = *tokens;
    for (const Tokens& one : *tokens) {
      if (static_cast<int>(one.size()) != flags_.tokens) {
        return absl::InternalError(absl::StrCat(ways_[w].name, " brought ", one.size(),
                                                " tokens instead of ", flags_.tokens));
      }
    }
    if (*tokens != expected_) {
      return absl::InternalError(
          absl::StrCat(ways_[w].name, " brought other tokens than ", ways_[0].name));
    }
    return Figures{seconds.count(), OwnCpuSeconds() - cpu_start, n_messages};
  }

  void Print(const std::vector<Round>& rounds, size_t n_streams) const {
    const double n_tokens = static_cast<double>(n_streams) * flags_.tokens;
    std::printf(
        "| way | tok/s | min to max | tokens a message | CPU ms a token | overhead | "
        "min to max |\n");
    std::printf("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (size_t w = 0; w < ways_.size(); ++w) {
      std::vector<double> rates;
      std::vector<double> cpu_seconds;
      std::vector<double> overheads;
      double n_messages = 0;
      for (const Round& round : rounds) {
        rates.push_back(n_tokens / round[w].seconds);
        cpu_seconds.push_back(round[w].cpu_seconds / n_tokens);
        overheads.push_back(100 * (round[w].seconds / round[0].seconds - 1));
        n_messages += round[w].n_messages;
      }
      const auto [slowest, fastest] = std::minmax_element(rates.begin(), rates.end());
      const auto [least, most] = std::minmax_element(overheads.begin(), overheads.end());
      std::printf("| %s | %.1f | %.1f to %.1f | %.2f | %.3f |", ways_[w].name.c_str(),
                  Median(rates), *slowest, *fastest,
                  n_tokens * static_cast<double>(rounds.size()) / n_messages,
                  1e3 * Median(cpu_seconds));
      if (w == 0) {
        std::printf(" | |\n");
        continue;
      }
      const double overhead = Median(overheads);
      std::printf(" %.1f %%%s | %.1f to %.1f %% |\n", overhead,
                  overhead <= 100 * kOverheadTarget ? "" : " (over the target)", *least, *most);
    }
    std::fflush(stdout);
  }

  const Flags& flags_;
  const std::vector<Way> ways_;  // the first is what the others are compared with
  std::vector<Tokens> expected_;
  size_t n_rounds_ = 0;
};

// Requests that stream until they are cancelled.
class CancelledStreams {
 public:
  CancelledStreams(client::Client& client, const std::vector<Tokens>& prompts)
      : streams_(prompts.size()) {
    for (size_t i = 0; i < prompts.size(); ++i) {
      Stream& stream = streams_[i];
      stream.thread = std::thread([&client, &stream, &prompt = prompts[i]] {
        constexpr int kTokens = 1500;  // more than are waited for
        StreamOne(
            client, prompt, kTokens, [&](int n) { stream.n_tokens += n; }, &stream.cancellation)
            .status()
            .IgnoreError();
      });
    }
  }
  ~CancelledStreams() {
    for (Stream& stream : streams_) {
      stream.cancellation.Cancel();
      stream.thread.join();
    }
  }

  size_t size() const { return streams_.size(); }
  int n_tokens() const {  // of the stream that has fewest
    int least = streams_[0].n_tokens;
    for (const Stream& stream : streams_) least = std::min(least, stream.n_tokens.load());
    return least;
  }
  void Cancel(size_t i) { streams_[i].cancellation.Cancel(); }

 private:
  struct Stream {
    std::atomic<int> n_tokens = 0;
    Cancellation cancellation;
    std::thread thread;
  };
  std::vector<Stream> streams_;
};

absl::StatusOr<int> NumRunning(const testing::ServiceFixture& fixture) {
  WALSH_ASSIGN_OR_RETURN(const std::string page,
                         testing::HttpGet(fixture.endpoint("worker", "metrics"), "/metrics"));
  for (const absl::string_view line : absl::StrSplit(page, '\n')) {
    if (!absl::StartsWith(line, "walsh_num_requests_running{")) continue;
    int n = 0;
    if (absl::SimpleAtoi(line.substr(line.rfind(' ') + 1), &n)) return n;
  }
  return absl::InternalError("the worker's metrics do not tell how many requests run");
}

absl::Status MeasureCancels(testing::ServiceFixture& fixture, const std::vector<Tokens>& prompts,
                            int rounds) {
  using Milliseconds = std::chrono::duration<double, std::milli>;
  constexpr int kTokens = 16;
  constexpr absl::Duration kLimit = absl::Seconds(60);
  std::vector<double> steps_ms;
  std::vector<double> cancels_ms;
  for (int round = 0; round < rounds; ++round) {
    CancelledStreams streams(fixture.client(), prompts);
    const auto has_tokens = [&](int n) {
      return testing::WaitUntil([&] { return streams.n_tokens() >= n; }, kLimit);
    };
    if (!has_tokens(1)) return absl::DeadlineExceededError("a stream brings no tokens");
    const int n_before = streams.n_tokens();
    const auto begin = std::chrono::steady_clock::now();
    if (!has_tokens(n_before + kTokens)) return absl::DeadlineExceededError("streams stand still");
    steps_ms.push_back(Milliseconds(std::chrono::steady_clock::now() - begin).count() /
                       (streams.n_tokens() - n_before));
    for (size_t i = 0; i < streams.size(); ++i) {
      const auto n_left = static_cast<int>(streams.size() - i) - 1;
      const auto start = std::chrono::steady_clock::now();
      streams.Cancel(i);
      absl::StatusOr<int> n_running;
      do {
        n_running = NumRunning(fixture);
        WALSH_RETURN_IF_ERROR(n_running.status());
      } while (*n_running > n_left);
      cancels_ms.push_back(Milliseconds(std::chrono::steady_clock::now() - start).count());
    }
  }
  std::printf(
      "\n%d streams at once, cancelled one after the other, %d times: gone after %.1f ms (median), "
      "%.1f at most; a step takes %.1f ms (median)\n",
      static_cast<int>(prompts.size()), rounds, Median(cancels_ms),
      *std::max_element(cancels_ms.begin(), cancels_ms.end()), Median(steps_ms));
  return absl::OkStatus();
}

absl::Status Run(const Flags& flags) {
  std::printf("%s\nprompts of %d tokens, %d new tokens, %s; --stream-interval-ms %g\n",
              DescribeRun(flags.threads).c_str(), static_cast<int>(flags.prompt), flags.tokens,
              flags.artifact.c_str(), flags.stream_interval_ms);
  // Each service has a folder of models of its own, with the artifact in it.
  const testing::TempDir dir;
  const fs::path artifact = fs::absolute(flags.artifact);
  for (const char* models : {"local", "worker/models"}) {
    WALSH_RETURN_IF_ERROR(MakeDirectories(dir / models));
    std::error_code error;
    fs::create_directory_symlink(artifact, fs::path(dir / models) / kModelId, error);
    if (error) return ErrnoStatus(error.value(), "link the artifact");
  }

  setenv("WALSH_BIN_DIR", BinDir().c_str(), /*overwrite=*/0);
  setenv("WALSH_STREAM_INTERVAL_MS", absl::StrCat(flags.stream_interval_ms).c_str(),
         /*overwrite=*/1);
  testing::ServiceFixture fixture({.n_threads = flags.threads, .worker_data_dir = dir / "worker"});
  WALSH_RETURN_IF_ERROR(fixture.Start());
  // The coordinator hears of the worker's models a moment after the worker itself.
  absl::Status loaded;
  const auto is_loaded = [&] {
    loaded = fixture.client().LoadModel(kModelId).status();
    return !absl::IsNotFound(loaded);
  };
  if (!testing::WaitUntil(is_loaded, absl::Seconds(30)) || !loaded.ok()) return loaded;
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<LocalService> local,
                         LocalService::Start(dir / "local", flags.threads,
                                             absl::Milliseconds(flags.stream_interval_ms)));

  client::Client to_local({.address = local->address()});
  client::Client to_worker({.address = fixture.endpoint("worker", "grpc")});
  std::vector<Tokens> prompts;
  for (const int n_streams : flags.streams) {
    prompts.clear();
    for (int i = 0; i < n_streams; ++i) {
      WALSH_ASSIGN_OR_RETURN(Tokens prompt, MakePrompt(local->engine().model(), flags.prompt, i));
      prompts.push_back(std::move(prompt));
    }
    Comparison comparison(
        flags, {InProcess(&local->engine()), OverGrpc("gRPC", &to_local),
                OverGrpc("worker", &to_worker), OverGrpc("coordinator", &fixture.client())});
    WALSH_RETURN_IF_ERROR(comparison.Run(prompts));
  }
  std::printf("\ntarget: gRPC adds at most %.0f %%\n", 100 * kOverheadTarget);
  return MeasureCancels(fixture, prompts, flags.rounds);
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("What gRPC takes of the engine's tokens per second, and what a cancel takes");
  app.add_option("artifact", flags.artifact, "Artifact directory");
  app.add_option("--threads", flags.threads, "Of each engine")->check(CLI::PositiveNumber);
  app.add_option("--rounds", flags.rounds)->check(CLI::PositiveNumber);
  app.add_option("--seconds", flags.seconds_max, "How long to try for quiet rounds");
  app.add_option("--tokens", flags.tokens, "New tokens of each request")
      ->check(CLI::PositiveNumber);
  app.add_option("--prompt", flags.prompt, "Prompt tokens")->check(CLI::PositiveNumber);
  app.add_option("--streams", flags.streams, "Requests at once")
      ->delimiter(',')
      ->check(CLI::Range(1, 16));
  app.add_option("--stream-interval-ms", flags.stream_interval_ms, "As walsh-worker's")
      ->capture_default_str();
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
