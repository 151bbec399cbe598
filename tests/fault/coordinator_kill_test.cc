// kill -9 of the real coordinator while clients submit and watch and a worker works: what was
// acknowledged is there afterwards, once, nothing that was refused is, every job comes to its end,
// and no watcher misses or repeats an event.
#include <grpcpp/client_context.h>
#include <signal.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "tests/testing/daemon_process.h"
#include "tests/testing/fake_worker.h"
#include "tests/testing/random_seed.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh {
namespace {

using ::walsh::testing::DaemonProcess;
using ::walsh::testing::IsOk;
using ::walsh::testing::Pause;
using ::walsh::testing::WaitUntil;

constexpr int kSubmitsMax = 400;

const std::vector<std::string> kFreePorts = {"--grpc-port", "0", "--internal-port", "0",
                                             "--http-port", "0", "--metrics-port",  "0"};

class CoordinatorKillTest : public ::testing::Test {
 protected:
  std::string DataDir() const { return dir_ / "data"; }

  static std::unique_ptr<v1::QuantizationService::Stub> Connect(const Endpoints& endpoints) {
    static int connection = 0;
    return v1::QuantizationService::NewStub(MakeChannel(endpoints.at("grpc"), ++connection));
  }

  // Submits until the coordinator is gone, at most kSubmitsMax. Each acknowledged id is recorded
  // with its request_id.
  void SubmitUntilGone(v1::QuantizationService::Stub* stub, const std::string& prefix) {
    for (int i = 0; i < kSubmitsMax; ++i) {
      const std::string id = prefix + "-" + std::to_string(i);
      v1::CreateQuantizationJobRequest request;
      request.set_quantization_job_id(id);
      request.set_request_id("request-" + id);
      request.mutable_quantization_job()->set_source_model("/models/tiny");
      request.mutable_quantization_job()->set_model_name("model-" + id);
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
      v1::QuantizationJob job;
      const grpc::Status status = stub->CreateQuantizationJob(&context, request, &job);
      if (!status.ok()) return;
      acknowledged_.insert(job.name());
    }
  }

  // Every job that the coordinator lists; each once.
  std::set<std::string> Stored(v1::QuantizationService::Stub* stub) {
    std::set<std::string> names;
    v1::ListQuantizationJobsRequest request;
    request.set_page_size(1000);
    do {
      grpc::ClientContext context;
      v1::ListQuantizationJobsResponse response;
      const grpc::Status status = stub->ListQuantizationJobs(&context, request, &response);
      EXPECT_TRUE(status.ok()) << status.error_message();
      for (const v1::QuantizationJob& job : response.quantization_jobs()) {
        EXPECT_TRUE(names.insert(job.name()).second) << job.name() << " is there twice";
        EXPECT_EQ(job.state(), v1::QuantizationJob::QUEUED);
      }
      request.set_page_token(response.next_page_token());
    } while (!request.page_token().empty());
    return names;
  }

  // Starts a coordinator on what the killed one left and checks it.
  void CheckRecovery(const std::string& trace) {
    SCOPED_TRACE(trace);
    const absl::Time start = absl::Now();
    DaemonProcess daemon("coordinator", DataDir(), kFreePorts);
    ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, daemon.WaitUntilReady());
    EXPECT_LT(absl::Now() - start, absl::Seconds(10)) << "restart time";
    const auto stub = Connect(endpoints);
    const std::set<std::string> stored = Stored(stub.get());
    for (const std::string& name : acknowledged_) EXPECT_TRUE(stored.contains(name)) << name;
    // A job may be stored without its answer having left: one for each kill.
    EXPECT_LE(stored.size(), acknowledged_.size() + n_kills_);
    daemon.Signal(SIGTERM);
    ASSERT_OK_AND_ASSIGN(const int exit_status, daemon.Wait());
    EXPECT_EQ(exit_status, 0);
  }

  testing::TempDir dir_;
  std::set<std::string> acknowledged_;
  size_t n_kills_ = 0;
};

TEST_F(CoordinatorKillTest, AcknowledgedJobsSurviveRandomKills) {
  std::mt19937_64 random(testing::RandomSeed());
  constexpr int kKills = 12;
  for (int kill_index = 0; kill_index < kKills; ++kill_index) {
    DaemonProcess daemon("coordinator", DataDir(), kFreePorts);
    ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, daemon.WaitUntilReady());
    const auto stub = Connect(endpoints);
    const absl::Duration life = absl::Milliseconds(static_cast<int64_t>(random() % 400));
    std::thread killer([&] {
      Pause(life);
      daemon.Signal(SIGKILL);
    });
    SubmitUntilGone(stub.get(), "k" + std::to_string(kill_index));
    killer.join();
    ASSERT_OK(daemon.Wait());
    ++n_kills_;
  }
  EXPECT_GT(acknowledged_.size(), size_t{kKills});
  CheckRecovery("after all kills");
}

// The side of a worker that holds on to its job whatever becomes of the coordinator: calls are made
// again until they are answered, after registering where the coordinator is new.
class StubbornWorker {
 public:
  explicit StubbornWorker(const std::string& coordinator)
      : worker_(coordinator, "w1"), thread_([this] { Work(); }) {}
  // When no more jobs come.
  void Join() {
    is_over_ = true;
    thread_.join();
  }

 private:
  void Work() {
    while (!is_over_) {
      std::optional<testing::FakeWorker::Lease> lease;
      Insist([&]() -> absl::Status {
        auto acquired = worker_.Acquire(absl::Milliseconds(200));
        if (acquired.ok()) lease = *acquired;
        return acquired.status();
      });
      if (!lease.has_value()) continue;
      for (int layer = 0; layer < 10; ++layer) {
        Insist([&] {
          return worker_.Report(*lease, v1::QuantizationJob::QUANTIZING, layer / 10.0,
                                "layer " + std::to_string(layer));
        });
      }
      Insist([&] { return worker_.Report(*lease, v1::QuantizationJob::PUBLISHING, 0.99); });
      Insist([&] { return worker_.Succeed(*lease); });
    }
  }

  template <typename Attempt>
  void Insist(const Attempt& attempt) {
    absl::Status status;
    const bool is_answered = WaitUntil([&] {
      status = attempt();
      if (absl::IsNotFound(status)) worker_.Register().IgnoreError();
      return !absl::IsNotFound(status) && !absl::IsUnavailable(status);
    });
    EXPECT_TRUE(is_answered && status.ok()) << status;
  }

  testing::FakeWorker worker_;
  std::atomic<bool> is_over_{false};
  std::thread thread_;
};

class WholeLifeTest : public CoordinatorKillTest {
 protected:
  // Submits a job, again and again under one request_id, until it is accepted.
  void Submit(v1::QuantizationService::Stub* stub, const std::string& id) {
    v1::CreateQuantizationJobRequest request;
    request.set_quantization_job_id(id);
    request.set_request_id("request-" + id);
    request.mutable_quantization_job()->set_source_model("/models/tiny");
    request.mutable_quantization_job()->set_model_name("model-" + id);
    grpc::Status status;
    EXPECT_TRUE(WaitUntil([&] {
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
      v1::QuantizationJob job;
      status = stub->CreateQuantizationJob(&context, request, &job);
      return status.error_code() != grpc::StatusCode::UNAVAILABLE;
    }));
    EXPECT_TRUE(status.ok()) << id << ": " << status.error_message();
  }

  // Watches it to its end, from where it was after each break.
  void Watch(v1::QuantizationService::Stub* stub, const std::string& id) {
    v1::QuantizationJobEvent last;
    grpc::Status status;
    EXPECT_TRUE(WaitUntil([&] {
      grpc::ClientContext context;
      v1::WatchQuantizationJobRequest request;
      request.set_name(id);
      request.set_after_sequence(last.sequence());
      const auto reader = stub->WatchQuantizationJob(&context, request);
      for (v1::QuantizationJobEvent event; reader->Read(&event);) {
        if (event.heartbeat()) continue;
        EXPECT_EQ(event.sequence(), last.sequence() + 1) << id;
        last = event;
      }
      status = reader->Finish();
      if (status.error_code() != grpc::StatusCode::UNAVAILABLE) return true;
      ++n_breaks_;
      return false;
    }));
    EXPECT_TRUE(status.ok()) << id << ": " << status.error_message();
    EXPECT_EQ(last.state(), v1::QuantizationJob::SUCCEEDED) << id << ": " << last.message();
  }

  std::atomic<int> n_breaks_{0};
};

TEST_F(WholeLifeTest, JobsEndAndWatchesHaveNoGapAcrossRandomKills) {
  std::mt19937_64 random(testing::RandomSeed());
  std::vector<std::string> ports = kFreePorts;
  std::unique_ptr<StubbornWorker> worker;
  std::vector<std::thread> clients;
  std::atomic<bool> is_over{false};
  std::atomic<int> n_jobs{0};
  std::optional<DaemonProcess> daemon;
  constexpr int kKills = 15;
  for (int n_kills = 0; n_kills <= kKills; ++n_kills) {
    daemon.emplace("coordinator", DataDir(), ports);
    const absl::StatusOr<Endpoints> endpoints = daemon->WaitUntilReady();
    EXPECT_OK(endpoints);
    if (!endpoints.ok()) break;
    if (worker == nullptr) {
      // Who comes back comes to the same ports.
      const auto port = [&](const std::string& name) {
        return endpoints->at(name).substr(endpoints->at(name).rfind(':') + 1);
      };
      ports[1] = port("grpc");
      ports[3] = port("internal");
      worker = std::make_unique<StubbornWorker>(endpoints->at("internal"));
      for (const std::string name : {"a", "b"}) {
        clients.emplace_back([&, name, stub = std::shared_ptr(Connect(*endpoints))] {
          for (int i = 0; !is_over; ++i) {
            const std::string id = name + std::to_string(i);
            Submit(stub.get(), id);
            Watch(stub.get(), id);
            ++n_jobs;
          }
        });
      }
    }
    if (n_kills == kKills) break;
    Pause(absl::Milliseconds(static_cast<int64_t>(random() % 400)));
    daemon->Signal(SIGKILL);
    EXPECT_OK(daemon->Wait());
  }
  is_over = true;
  for (std::thread& client : clients) client.join();
  if (worker != nullptr) worker->Join();
  EXPECT_GT(n_jobs, 4);
  EXPECT_GT(n_breaks_, 4) << "the kills hit watches";
}

// A call that hangs on its worker keeps the coordinator from stopping; the second SIGTERM does not
// wait.
TEST_F(CoordinatorKillTest, SecondSigtermLeavesAtOnce) {
  std::vector<std::string> arguments = kFreePorts;
  arguments.insert(arguments.end(), {"--shutdown-timeout", "60"});
  DaemonProcess daemon("coordinator", DataDir(), arguments);
  ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, daemon.WaitUntilReady());
  testing::FakeWorker worker(endpoints.at("internal"), "w1");
  std::atomic<bool> is_asked{false};
  std::atomic<bool> may_answer{false};
  worker.on_validate = [&](const auto&, auto*) {
    is_asked = true;
    EXPECT_TRUE(WaitUntil([&] { return may_answer.load(); }));
    return grpc::Status::OK;
  };
  ASSERT_OK(worker.Register());
  std::thread client([&] { SubmitUntilGone(Connect(endpoints).get(), "hangs"); });
  ASSERT_TRUE(WaitUntil([&] { return is_asked.load(); }));
  daemon.Signal(SIGTERM);
  // Nothing shows from outside that the first signal was taken; sooner, the two would be one.
  Pause(absl::Seconds(1));
  EXPECT_TRUE(daemon.is_running());
  daemon.Signal(SIGTERM);
  ASSERT_OK_AND_ASSIGN(const int exit_status, daemon.Wait(absl::Seconds(5)));
  EXPECT_EQ(exit_status, 1);
  may_answer = true;
  client.join();
}

TEST_F(CoordinatorKillTest, NewerSchemaIsRefused) {
  {
    DaemonProcess daemon("coordinator", DataDir(), kFreePorts);
    ASSERT_OK(daemon.WaitUntilReady());
  }
  const std::string command =
      "sqlite3 '" + DataDir() + "/coordinator.db' 'PRAGMA user_version = 99' > /dev/null 2>&1";
  if (std::system(command.c_str()) != 0) GTEST_SKIP() << "no sqlite3 command";
  DaemonProcess daemon("coordinator", DataDir(), kFreePorts);
  EXPECT_FALSE(daemon.WaitUntilReady().ok());
  ASSERT_OK_AND_ASSIGN(const int exit_status, daemon.Wait());
  EXPECT_EQ(exit_status, 1);
}

}  // namespace
}  // namespace walsh
