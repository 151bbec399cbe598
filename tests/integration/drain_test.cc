// Goal:   daemons leave without losing a request that they could have let end: a rolling restart of
//         two workers under load fails nothing; what outlasts the shutdown timeout is told why.
// Method: the real daemons, two workers with the same small model, and the client library without
//         retries, which would hide a refused request. Several threads send requests without a
//         pause, streamed and not, while each worker in turn gets SIGTERM and is started again.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "client/child_process.h"
#include "common/endpoints.h"
#include "common/grpc_status.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"
#include "worker/io/checkpoint.h"

namespace walsh {
namespace {

using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

constexpr int kThreads = 4;
constexpr int kRestarts = 2;  // of each worker
constexpr int kEndless = 1 << 16;

class DrainTest : public ::testing::Test {
 protected:
  // A worker with a data folder of its own that holds the model, which it loads at the start.
  struct Worker {
    std::string data_dir;
    std::unique_ptr<client::ChildProcess> process;
  };

  void SetUp() override {
    TinyModel({.hidden = 64, .n_layers = 2, .max_position = kEndless}).WriteHf(dir_ / "tiny");
    ASSERT_OK(service_.StartCoordinator());
    client::ClientOptions options{.address = service_.endpoint("coordinator", "grpc")};
    options.attempts_max = 1;
    client_ = std::make_unique<client::Client>(options);
  }

  void AddWorker(const std::string& shutdown_timeout) {
    Worker worker{.data_dir = dir_ / ("worker-" + std::to_string(workers_.size()))};
    std::filesystem::create_directories(worker.data_dir + "/models");
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "tiny"));
    ASSERT_OK(testing::WriteTinyArtifact(*checkpoint, worker.data_dir + "/models/m"));
    shutdown_timeout_ = shutdown_timeout;
    ASSERT_NO_FATAL_FAILURE(StartWorker(&worker));
    workers_.push_back(std::move(worker));
  }
  // Returns when it has served a request.
  void StartWorker(Worker* worker) {
    client::SpawnOptions spawn;
    spawn.argv = {testing::BinaryPath("walsh-worker"),
                  "--coordinator",
                  service_.endpoint("coordinator", "internal"),
                  "--data-dir",
                  worker->data_dir,
                  "--grpc-port=0",
                  "--metrics-port=0",
                  "--threads=1",
                  "--device=cpu",
                  "--max-num-seqs=4",
                  "--kv-cache-tokens",
                  std::to_string(kEndless),
                  "--load-model=m",
                  "--shutdown-timeout",
                  shutdown_timeout_};
    spawn.stdout_path = spawn.stderr_path = worker->data_dir + "/log";
    RemoveEndpoints(worker->data_dir, "worker");
    ASSERT_OK_AND_ASSIGN(client::ChildProcess process, client::ChildProcess::Spawn(spawn));
    worker->process = std::make_unique<client::ChildProcess>(std::move(process));
    ASSERT_TRUE(WaitUntil([&] {
      client_->Generate(Prompt(1)).status().IgnoreError();  // refused until a worker is there
      return HasServed(*worker);
    })) << worker->data_dir;
  }
  // Only a worker that the coordinator knows to be ready is sent anything.
  static bool HasServed(const Worker& worker) {
    const absl::StatusOr<Endpoints> endpoints = ReadEndpoints(worker.data_dir, "worker");
    if (!endpoints.ok()) return false;
    const auto page = testing::HttpGet(endpoints->at("metrics"), "/metrics");
    constexpr char kServed[] = "walsh_generation_tokens_total{model_name=\"m\"} ";
    const size_t at = page.ok() ? page->find(kServed) : std::string::npos;
    return at != std::string::npos && page->at(at + sizeof(kServed) - 1) != '0';
  }
  static void Leave(Worker* worker) {
    worker->process->Signal(SIGTERM);
    const auto ended = worker->process->Wait(absl::Seconds(60));
    ASSERT_TRUE(ended.has_value());
    EXPECT_EQ(client::ExitCode(*ended), 0);
  }

  static v1::GenerateRequest Prompt(int n_tokens) {
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt("Once upon a time");
    request.mutable_sampling()->set_max_tokens(n_tokens);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }
  // A stream that ends with its worker or its coordinator; returns when it has begun.
  void StartEndlessStream() {
    stream_ = std::thread([this] {
      stream_status_ = client_->GenerateStream(
          Prompt(kEndless / 2), [&](const v1::GenerateStreamResponse&) { has_begun_ = true; });
    });
    ASSERT_TRUE(WaitUntil([&] { return has_begun_.load(); }));
  }

  testing::TempDir dir_;
  ServiceFixture service_;
  std::unique_ptr<client::Client> client_;
  std::string shutdown_timeout_;
  std::vector<Worker> workers_;
  std::thread stream_;
  std::atomic<bool> has_begun_ = false;
  absl::Status stream_status_;
};

TEST_F(DrainTest, ARollingRestartUnderLoadFailsNoRequest) {
  ASSERT_NO_FATAL_FAILURE(AddWorker("30"));
  std::atomic<bool> is_over = false;
  std::atomic<int> n_requests = 0;
  std::mutex mu;
  std::vector<absl::Status> failures;
  std::vector<std::thread> clients;
  for (int i = 0; i < kThreads; ++i) {
    clients.emplace_back([&, i] {
      while (!is_over) {
        const v1::GenerateRequest request = Prompt(1 + n_requests++ % 16);
        const absl::Status status =
            i % 2 == 0 ? client_->Generate(request).status()
                       : client_->GenerateStream(request, [](const v1::GenerateStreamResponse&) {});
        if (status.ok()) continue;
        const std::lock_guard lock(mu);
        failures.push_back(status);
      }
    });
  }
  AddWorker("30");
  for (int i = 0; i < kRestarts && !HasFatalFailure(); ++i) {
    for (Worker& worker : workers_) {
      Leave(&worker);
      StartWorker(&worker);
    }
  }
  is_over = true;
  for (std::thread& client : clients) client.join();
  EXPECT_TRUE(failures.empty()) << failures.size() << " of " << n_requests
                                << " failed, the first with " << failures[0];
  EXPECT_GT(n_requests, 100);
  RecordProperty("requests", n_requests);
}

TEST_F(DrainTest, AStreamThatOutlastsTheTimeoutOfItsWorkerIsToldWhy) {
  ASSERT_NO_FATAL_FAILURE(AddWorker("0.2"));
  ASSERT_NO_FATAL_FAILURE(StartEndlessStream());
  Leave(&workers_[0]);
  stream_.join();
  EXPECT_EQ(stream_status_.code(), absl::StatusCode::kUnavailable) << stream_status_;
  EXPECT_EQ(ErrorReason(stream_status_), "WORKER_STOPPING");
}

}  // namespace
}  // namespace walsh
