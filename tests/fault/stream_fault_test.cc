// Goal:   a client, a network or a disk with faults costs the requests that they concern and
// nothing
//         else (rows C7, C10, E2, E6, E7 and E10 of the fault matrix in docs/reliability.md).
// Method: the real daemons with a small model; clients that cancel at each token, or reach the
//         coordinator over a proxy that is slow, resets, half-closes, damages or says nothing; more
//         connections than descriptors; artifacts with a flipped bit.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "common/grpc_cancellation.h"
#include "common/publish.h"
#include "tests/testing/fault_injector.h"
#include "tests/testing/http_get.h"
#include "tests/testing/random_seed.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_proxy.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"
#include "worker/io/checkpoint.h"

namespace walsh {
namespace {

using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TcpProxy;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

constexpr int kEndless = 1 << 14;

class StreamFaultTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyModel({.n_layers = 2, .max_position = kEndless}).WriteHf(dir_ / "tiny");
    std::filesystem::create_directories(dir_ / "worker/models");
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "tiny"));
    ASSERT_OK(testing::WriteTinyArtifact(*checkpoint, Artifact()));
    service_ = std::make_unique<ServiceFixture>(testing::ServiceOptions{
        .worker_data_dir = dir_ / "worker",
        .worker_flags = {"--load-model=m", "--max-num-seqs=4", "--kv-cache-tokens",
                         std::to_string(kEndless), "--no-prefix-cache"}});
  }
  std::string Artifact() const { return dir_ / "worker/models/m"; }

  // Both daemons, with the model ready.
  void Start() {
    ASSERT_OK(service_->Start());
    ASSERT_TRUE(WaitUntil([&] {
      const auto model = service_->client().GetModel("m");
      return model.ok() && model->state() == v1::Model::READY;
    }));
  }

  static v1::GenerateRequest Prompt(int n_tokens) {
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt("Once upon a time");
    request.mutable_sampling()->set_max_tokens(n_tokens);
    request.mutable_sampling()->set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(0);
    return request;
  }

  // Whether the worker runs nothing and its KV cache is free, within what a step and a heartbeat
  // may take.
  bool IsFree() const {
    return WaitUntil(
        [&] {
          const auto page = testing::HttpGet(service_->endpoint("worker", "metrics"), "/metrics");
          return page.ok() &&
                 absl::StrContains(*page, "walsh_kv_cache_usage_perc{model_name=\"m\"} 0\n") &&
                 absl::StrContains(*page, "walsh_num_requests_running{model_name=\"m\"} 0\n");
        },
        absl::Seconds(5));
  }

  // A client that tries nothing again, at an address of the coordinator's public port.
  static client::Client ClientAt(const std::string& address) {
    return client::Client({.address = address, .attempts_max = 1});
  }

  const testing::TempDir dir_;
  std::unique_ptr<ServiceFixture> service_;
};

TEST_F(StreamFaultTest, E7ACancelAtAnyTokenFreesTheSequence) {
  ASSERT_NO_FATAL_FAILURE(Start());
  for (int at = 0; at <= 20; ++at) {
    SCOPED_TRACE(at);
    Cancellation cancellation;
    int n_tokens = 0;
    const absl::Status status = service_->client().GenerateStream(
        Prompt(kEndless / 2),
        [&](const v1::GenerateStreamResponse& event) {
          n_tokens += event.has_delta() ? 1 : 0;
          if (n_tokens >= at) cancellation.Cancel();
        },
        &cancellation);
    EXPECT_THAT(status, HasCode(absl::StatusCode::kCancelled));
    EXPECT_TRUE(IsFree());
  }
  EXPECT_OK(service_->client().Generate(Prompt(4)));
}

// A stream that runs on a thread of its own over a network with faults.
class RemoteStream {
 public:
  RemoteStream(const std::string& address, const v1::GenerateRequest& request,
               absl::Duration timeout = absl::Seconds(20))
      : client_({.address = address, .attempts_max = 1}), thread_([this, request, timeout] {
          status_ = client_.GenerateStream(
              request,
              [this](const v1::GenerateStreamResponse& event) {
                if (event.has_delta()) ++n_deltas_;
              },
              nullptr, timeout);
          is_over_ = true;
        }) {}
  ~RemoteStream() {
    if (thread_.joinable()) thread_.join();
  }
  bool HasBegun() {
    return WaitUntil([this] { return n_deltas_ > 0 || is_over_; });
  }
  absl::Status Join() {
    thread_.join();
    return status_;
  }

 private:
  client::Client client_;
  std::atomic<int> n_deltas_ = 0;
  std::atomic<bool> is_over_ = false;
  absl::Status status_;
  std::thread thread_;
};

TEST_F(StreamFaultTest, E6AClientWhoseConnectionIsResetIsForgottenAtOnce) {
  ASSERT_NO_FATAL_FAILURE(Start());
  TcpProxy network(service_->endpoint("coordinator", "grpc"));
  RemoteStream stream(network.address(), Prompt(kEndless / 2));
  ASSERT_TRUE(stream.HasBegun());
  network.Reset();
  EXPECT_THAT(stream.Join(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_TRUE(IsFree());
}

TEST_F(StreamFaultTest, E10ASlowNetworkChangesNoToken) {
  ASSERT_NO_FATAL_FAILURE(Start());
  ASSERT_OK_AND_ASSIGN(const auto expected, service_->client().Generate(Prompt(100)));
  TcpProxy network(service_->endpoint("coordinator", "grpc"));
  network.SetDelay(absl::Milliseconds(100));
  network.SetRate(12'500);  // 100 kbit/s
  client::Client client = ClientAt(network.address());
  std::string text;
  EXPECT_OK(client.GenerateStream(
      Prompt(100), [&](const v1::GenerateStreamResponse& event) { text += event.delta().text(); }));
  EXPECT_EQ(text, expected.text());
}

TEST_F(StreamFaultTest, E10WhatBreaksAConnectionEndsItsStreamsAlone) {
  ASSERT_NO_FATAL_FAILURE(Start());
  struct Break {
    const char* name;
    void (*apply)(TcpProxy&);
  };
  const Break breaks[] = {
      {"no more requests", [](TcpProxy& network) { network.HalfClose(TcpProxy::kRequests); }},
      {"no more answers", [](TcpProxy& network) { network.HalfClose(TcpProxy::kAnswers); }},
      {"garbage to the coordinator",
       [](TcpProxy& network) { network.Inject(TcpProxy::kRequests, std::string(1000, '\xa5')); }},
      {"garbage to the client",
       [](TcpProxy& network) { network.Inject(TcpProxy::kAnswers, std::string(1000, '\xa5')); }},
  };
  for (const Break& broken : breaks) {
    SCOPED_TRACE(broken.name);
    TcpProxy network(service_->endpoint("coordinator", "grpc"));
    RemoteStream beside(service_->endpoint("coordinator", "grpc"), Prompt(400));
    RemoteStream stream(network.address(), Prompt(kEndless / 2));
    ASSERT_TRUE(stream.HasBegun());
    broken.apply(network);
    const absl::Time start = absl::Now();
    EXPECT_FALSE(stream.Join().ok());
    EXPECT_LT(absl::Now() - start, absl::Seconds(5));
    EXPECT_OK(beside.Join());
    EXPECT_TRUE(IsFree());
  }
}

TEST_F(StreamFaultTest, E10ASilentNetworkHoldsACallNoLongerThanItsDeadline) {
  ASSERT_NO_FATAL_FAILURE(Start());
  TcpProxy network(service_->endpoint("coordinator", "grpc"));
  RemoteStream stream(network.address(), Prompt(kEndless / 2), absl::Seconds(2));
  const absl::Time start = absl::Now();
  ASSERT_TRUE(stream.HasBegun());
  network.Swallow(TcpProxy::kAnswers, true);
  network.Swallow(TcpProxy::kRequests, true);
  EXPECT_THAT(stream.Join(), HasCode(absl::StatusCode::kDeadlineExceeded));
  EXPECT_LT(absl::Now() - start, absl::Seconds(3));
  EXPECT_TRUE(IsFree()) << "the deadline is the worker's, too";
}

// More connections than the coordinator has descriptors; all are given up again.
TEST_F(StreamFaultTest, E2TheCoordinatorAnswersAfterItRanOutOfDescriptors) {
  service_->set_launch("coordinator", {.wrapper = {"/usr/bin/prlimit", "--nofile=96:96"}});
  ASSERT_NO_FATAL_FAILURE(Start());
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const std::string endpoint = service_->endpoint("coordinator", "grpc");
  int port = 0;
  ASSERT_TRUE(absl::SimpleAtoi(endpoint.substr(endpoint.rfind(':') + 1), &port));
  address.sin_port = htons(static_cast<uint16_t>(port));
  std::vector<int> sockets;
  for (int i = 0; i < 120; ++i) {
    sockets.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(sockets.back(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
              0);
  }
  ASSERT_TRUE(WaitUntil(
      [&] { return absl::StrContains(service_->Log("coordinator"), "Too many open files"); }));
  for (const int fd : sockets) close(fd);
  const absl::Time start = absl::Now();
  client::Client client = ClientAt(endpoint);
  EXPECT_TRUE(
      WaitUntil([&] { return client.CheckHealth("", absl::Seconds(2)).ok(); }, absl::Seconds(30)));
  std::printf("answered after %.1f s\n", absl::ToDoubleSeconds(absl::Now() - start));
}

TEST_F(StreamFaultTest, C7NoDamagedArtifactIsLoaded) {
  ASSERT_NO_FATAL_FAILURE(Start());
  ASSERT_OK(service_->client().UnloadModel("m"));
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(Artifact())) {
    files.push_back(entry.path());
  }
  std::mt19937_64 random(testing::RandomSeed());
  const int n_flips = testing::FaultStep(10) == 1 ? 1000 : 100;
  int n_loads = 0;
  for (int i = 0; i < n_flips; ++i) {
    const std::string& path = files[random() % files.size()];
    ASSERT_OK_AND_ASSIGN(const std::string whole, ReadFile(path, 1 << 30));
    std::string damaged = whole;
    const size_t at = random() % damaged.size();
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << random() % 8));
    std::ofstream(path, std::ios::binary) << damaged;
    const auto model = service_->client().LoadModel("m");
    std::ofstream(path, std::ios::binary) << whole;
    if (model.ok()) {
      ++n_loads;
      ADD_FAILURE() << path << " differs at " << at << ": "
                    << damaged.substr(at < 40 ? 0 : at - 40, 80);
      ASSERT_OK(service_->client().UnloadModel("m"));
    }
  }
  std::printf("%d flips, %d loads\n", n_flips, n_loads);
  EXPECT_OK(service_->client().LoadModel("m"));
}

}  // namespace
}  // namespace walsh
