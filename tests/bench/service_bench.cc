// What gRPC takes of the engine's tokens per second.
//
//   service_bench [ARTIFACT] --threads 2
//
// The same greedy requests of fixed length go four ways, in turns, in one run:
//   engine       the engine of this process, called in process
//   gRPC         GenerateStream over loopback to the worker's service in this process, in front of
//                that same engine
//   worker       GenerateStream to a walsh-worker process
//   coordinator  GenerateStream to a walsh-coordinator process, which passes it on to that worker
// Every way has to bring the same tokens. Each round takes every way once, from another one on each
// time; a way's overhead is its time over that of the engine in the same round, less one, and the
// table has the median over rounds. Times are wall time from the request to the last token, prompt
// included. All engines have as many threads; those that wait use no CPU. The CPU time is that of
// this process: for the last two ways the client's alone.
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

#include "absl/strings/str_cat.h"
#include "client/child_process.h"
#include "client/client.h"
#include "common/clock.h"
#include "common/command_line.h"
#include "common/grpc_server.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/bench/bandwidth.h"
#include "tests/bench/conditions.h"
#include "tests/bench/generation.h"
#include "tests/bench/inputs.h"
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
  int tokens = 256;
  int64_t prompt = 32;
  std::vector<int> streams = {1, 8};
};

// The worker's service in this process, on a free port.
class LocalService {
 public:
  static absl::StatusOr<std::unique_ptr<LocalService>> Start(const std::string& models_dir,
                                                             int n_threads) {
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
    service->generation_ =
        std::make_unique<service::GenerationService>(service->models_.get(), Clock::Real());
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

// Where walsh-worker and walsh-coordinator are: beside this program, or in build/*/bin beside its
// folder.
std::string BinDir() {
  const std::string sibling = client::SiblingBinary("walsh-worker");
  const fs::path here = fs::path(sibling).parent_path();
  return fs::exists(sibling) ? here.string() : (here.parent_path() / "bin").string();
}

// One way that a request can go.
struct Way {
  std::string name;
  // Generates for all prompts at once; `n_messages` counts the messages with tokens.
  std::function<absl::StatusOr<std::vector<Tokens>>(const std::vector<Tokens>& prompts,
                                                    int max_tokens, std::atomic<int>& n_messages)>
      generate;
};

absl::StatusOr<Tokens> StreamOne(client::Client& client, const Tokens& prompt, int max_tokens,
                                 std::atomic<int>& n_messages) {
  v1::GenerateRequest request;
  request.set_model(absl::StrCat("models/", kModelId));
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_ignore_eos(true);
  Tokens tokens;
  WALSH_RETURN_IF_ERROR(
      client.GenerateStream(request, [&](const v1::GenerateStreamResponse& event) {
        if (!event.has_delta()) return;
        ++n_messages;
        tokens.insert(tokens.end(), event.delta().token_ids().begin(),
                      event.delta().token_ids().end());
      }));
  return tokens;
}

Way OverGrpc(std::string name, client::Client* client) {
  return {std::move(name),
          [client](const std::vector<Tokens>& prompts, int max_tokens,
                   std::atomic<int>& n_messages) -> absl::StatusOr<std::vector<Tokens>> {
            std::vector<absl::StatusOr<Tokens>> answers(prompts.size());
            std::vector<std::thread> threads;
            for (size_t i = 0; i < prompts.size(); ++i) {
              threads.emplace_back(
                  [&, i] { answers[i] = StreamOne(*client, prompts[i], max_tokens, n_messages); });
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
  Comparison(const Flags& flags, std::vector<Way> ways)
      : flags_(flags), ways_(std::move(ways)), seconds_(ways_.size()), cpu_seconds_(ways_.size()) {}

  absl::Status Run(const std::vector<Tokens>& prompts) {
    const size_t n_ways = ways_.size();
    for (size_t w = 0; w < n_ways; ++w) WALSH_RETURN_IF_ERROR(Turn(w, prompts).status());
    n_messages_ = 0;
    for (int round = 0; round < flags_.rounds; ++round) {
      for (size_t i = 0; i < n_ways; ++i) {
        const size_t w = (static_cast<size_t>(round) + i) % n_ways;
        const double cpu_start = OwnCpuSeconds();
        WALSH_ASSIGN_OR_RETURN(const double seconds, Turn(w, prompts));
        seconds_[w].push_back(seconds);
        cpu_seconds_[w].push_back(OwnCpuSeconds() - cpu_start);
      }
    }
    Print(prompts.size());
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<double> Turn(size_t w, const std::vector<Tokens>& prompts) {
    std::atomic<int>& n_messages = w == 0 ? n_calls_ : n_messages_;
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
    return seconds.count();
  }

  void Print(size_t n_streams) const {
    const auto n_tokens = static_cast<double>(n_streams) * flags_.tokens;
    const double n_sent = n_tokens * flags_.rounds * static_cast<double>(ways_.size() - 1);
    std::printf("\n%d streams at once; %.3f tokens a message over gRPC\n",
                static_cast<int>(n_streams), n_sent / n_messages_);
    std::printf("| way | tok/s | min to max | CPU ms a token | overhead | min to max |\n");
    std::printf("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    for (size_t w = 0; w < ways_.size(); ++w) {
      std::vector<double> rates;
      std::vector<double> overheads;
      for (size_t r = 0; r < seconds_[w].size(); ++r) {
        rates.push_back(n_tokens / seconds_[w][r]);
        overheads.push_back(100 * (seconds_[w][r] / seconds_[0][r] - 1));
      }
      const auto [slowest, fastest] = std::minmax_element(rates.begin(), rates.end());
      const auto [least, most] = std::minmax_element(overheads.begin(), overheads.end());
      std::printf("| %s | %.1f | %.1f to %.1f | %.3f |", ways_[w].name.c_str(), Median(rates),
                  *slowest, *fastest, 1e3 * Median(cpu_seconds_[w]) / n_tokens);
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
  std::vector<std::vector<double>> seconds_;
  std::vector<std::vector<double>> cpu_seconds_;
  std::vector<Tokens> expected_;
  std::atomic<int> n_calls_ = 0;
  std::atomic<int> n_messages_ = 0;
};

absl::Status Compare(const Flags& flags) {
  std::printf("%s\n%d rounds, prompts of %d tokens, %d new tokens, %s\n",
              DescribeRun(flags.threads).c_str(), flags.rounds, static_cast<int>(flags.prompt),
              flags.tokens, flags.artifact.c_str());
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
                         LocalService::Start(dir / "local", flags.threads));

  client::Client to_local({.address = local->address()});
  client::Client to_worker({.address = fixture.endpoint("worker", "grpc")});
  for (const int n_streams : flags.streams) {
    std::vector<Tokens> prompts;
    for (int i = 0; i < n_streams; ++i) {
      WALSH_ASSIGN_OR_RETURN(Tokens prompt, MakePrompt(local->engine().model(), flags.prompt, i));
      prompts.push_back(std::move(prompt));
    }
    Comparison comparison(
        flags, {InProcess(&local->engine()), OverGrpc("gRPC", &to_local),
                OverGrpc("worker", &to_worker), OverGrpc("coordinator", &fixture.client())});
    WALSH_RETURN_IF_ERROR(comparison.Run(prompts));
  }
  return absl::OkStatus();
}

absl::Status Run(const Flags& flags) {
  const OtherLoad others;
  WALSH_RETURN_IF_ERROR(Compare(flags));  // has waited for its daemons
  std::printf("\ntarget: gRPC adds at most %.0f %%\n", 100 * kOverheadTarget);
  std::printf("other processes took %.0f %% of the CPUs meanwhile\n", 100 * others.Share());
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("What gRPC takes of the engine's tokens per second");
  app.add_option("artifact", flags.artifact, "Artifact directory");
  app.add_option("--threads", flags.threads, "Of each engine")->check(CLI::PositiveNumber);
  app.add_option("--rounds", flags.rounds)->check(CLI::PositiveNumber);
  app.add_option("--tokens", flags.tokens, "New tokens of each request")
      ->check(CLI::PositiveNumber);
  app.add_option("--prompt", flags.prompt, "Prompt tokens")->check(CLI::PositiveNumber);
  app.add_option("--streams", flags.streams, "Requests at once")
      ->delimiter(',')
      ->check(CLI::Range(1, 16));
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
