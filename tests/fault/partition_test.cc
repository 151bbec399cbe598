// Goal:   a worker and a coordinator that do not hear each other, or whose clocks jump, do the work
//         of a job once (rows B1, B3, B4, B5 and B7 of the fault matrix in docs/reliability.md).
// Method: the real daemons, in two network namespaces with a cable that is cut in one direction or
//         both; behind a proxy that loses an answer; under libfaketime. Leases last 3 s.
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/testing/daemon_process.h"
#include "tests/testing/fault_injector.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_proxy.h"
#include "tests/testing/test_network.h"
#include "tests/testing/tiny_job.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::walsh::testing::DaemonProcess;
using ::walsh::testing::FaultAction;
using ::walsh::testing::FaultInjector;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TcpProxy;
using ::walsh::testing::TestNetwork;
using ::walsh::testing::TinyJob;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

constexpr int kLeaseSeconds = 3;

int Count(const std::string& text, const std::string& what) {
  int n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

class PartitionTest : public ::testing::Test {
 protected:
  testing::ServiceOptions Options() const {
    return {.model_roots = {job_.root()},
            .worker_data_dir = WorkerDir(),
            .lease_seconds = kLeaseSeconds};
  }
  std::string WorkerDir() const { return dir_ / "worker"; }

  // Every sync takes so long that a job takes some seconds, without any computing.
  void SlowDown() {
    disk_.Arm({.action = FaultAction::kDelay,
               .calls = testing::kSyncCall,
               .last = testing::kForEver,
               .delay = absl::Milliseconds(30)});
  }

  // Another worker of the same coordinator, ready.
  std::unique_ptr<DaemonProcess> StartOther(const ServiceFixture& service,
                                            const std::string& host) const {
    auto other = std::make_unique<DaemonProcess>(
        "worker", dir_ / "other",
        std::vector<std::string>{"--coordinator", service.endpoint("coordinator", "internal"),
                                 "--host", host, "--grpc-port=0", "--metrics-port=0",
                                 "--device=cpu", "--threads=1", "--model-root", job_.root()});
    EXPECT_OK(other->WaitUntilReady());
    return other;
  }

  static bool IsRunning(ServiceFixture& service, const std::string& name) {
    return WaitUntil([&] {
      const auto job = service.client().GetJob(name);
      return job.ok() && job->stage() >= Job::CALIBRATING;
    });
  }

  const TinyJob job_{/*n_layers=*/6};
  const testing::TempDir dir_;
  FaultInjector disk_{WorkerDir() + "/"};  // of the worker
};

struct Cut {
  const char* name;
  std::vector<TestNetwork::Direction> directions;
};

class CutTest : public PartitionTest, public ::testing::WithParamInterface<Cut> {
 protected:
  static void SetUpTestSuite() {
    if (TestNetwork::IsPossible()) network_ = new TestNetwork;
  }
  static void TearDownTestSuite() { delete network_; }

  void SetCut(bool is_cut) {
    for (const TestNetwork::Direction direction : GetParam().directions) {
      network_->Cut(direction, is_cut);
    }
  }

  static TestNetwork* network_;
};
TestNetwork* CutTest::network_ = nullptr;

TEST_P(CutTest, TheWorkerStopsByItselfAndAnotherOneDoesTheJobOnce) {
  if (network_ == nullptr) GTEST_SKIP() << TestNetwork::kNeeds;
  testing::ServiceOptions options = Options();
  options.coordinator_host = TestNetwork::kNearHost;
  options.worker_host = TestNetwork::kFarHost;
  ServiceFixture service(options);
  service.set_launch("worker", {network_->far_command(), disk_.environment()});
  ASSERT_OK(service.Start());
  SlowDown();
  ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request("j")));
  ASSERT_TRUE(IsRunning(service, created.name()));
  const auto other = StartOther(service, TestNetwork::kNearHost);

  SetCut(true);
  ASSERT_TRUE(WaitUntil([&] { return Count(service.Log("coordinator"), "lease expired") == 1; }));
  const int64_t n_syncs = disk_.n_calls();
  ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 2);
  ASSERT_TRUE(WaitUntil(
      [&] { return Count(service.Log("worker"), "job stopped without an outcome") == 1; }));
  EXPECT_EQ(Count(service.Log("worker"), "about to expire without a heartbeat"), 1);
  EXPECT_EQ(disk_.n_calls(), n_syncs) << "it stopped before the job might be another one's";
  EXPECT_EQ(Count(service.Log("worker"), "model published"), 0);
  EXPECT_FALSE(std::filesystem::exists(WorkerDir() + "/models/model-j"));

  SetCut(false);
  disk_.Disarm();
  ASSERT_TRUE(WaitUntil([&] {
    const auto workers = service.client().ListWorkers();
    int n_online = 0;
    if (!workers.ok()) return false;
    for (const v1::Worker& worker : workers->workers())
      n_online += worker.state() == v1::Worker::ONLINE;
    return n_online == 2;
  })) << "it is back";
  EXPECT_OK(service.client().LoadModel("model-j"));
  ASSERT_OK_AND_ASSIGN(const auto models, service.client().ListModels());
  EXPECT_EQ(models.models_size(), 1);
}

INSTANTIATE_TEST_SUITE_P(B3B4, CutTest,
                         ::testing::Values(Cut{"Both",
                                               {TestNetwork::kFromFar, TestNetwork::kToFar}},
                                           Cut{"FromTheWorker", {TestNetwork::kFromFar}},
                                           Cut{"ToTheWorker", {TestNetwork::kToFar}}),
                         [](const auto& param) { return param.param.name; });

TEST_F(PartitionTest, B1APausedWorkerThatWakesChangesNothing) {
  ServiceFixture service(Options());
  service.set_launch("worker", {.environment = disk_.environment()});
  ASSERT_OK(service.Start());
  SlowDown();
  ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request("j")));
  ASSERT_TRUE(IsRunning(service, created.name()));
  const auto other = StartOther(service, "127.0.0.1");
  service.SignalWorker(SIGSTOP);
  ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 2);
  service.SignalWorker(SIGCONT);
  ASSERT_TRUE(WaitUntil(
      [&] { return Count(service.Log("worker"), "job stopped without an outcome") == 1; }));
  EXPECT_EQ(Count(service.Log("worker"), "model published"), 0);
  EXPECT_FALSE(std::filesystem::exists(WorkerDir() + "/models/model-j"));
  ASSERT_OK_AND_ASSIGN(const Job after, service.client().GetJob(created.name()));
  EXPECT_EQ(after.etag(), finished.etag());
}

TEST_F(PartitionTest, B5ALostAnswerToACompletionIsAskedForAgain) {
  ServiceFixture service(Options());
  ASSERT_OK(service.StartCoordinator());
  TcpProxy network(service.endpoint("coordinator", "internal"));
  ASSERT_OK(service.StartWorker(network.address()));
  network.SwallowAnswersTo("CompleteJob");
  ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request("j")));
  std::vector<v1::QuantizationJobEvent> events;
  client::WatchObserver observer;
  observer.on_event = [&](const v1::QuantizationJobEvent& event) {
    if (!event.heartbeat()) events.push_back(event);
  };
  ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, observer));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  ASSERT_TRUE(network.has_swallowed_answers());
  EXPECT_EQ(Count(service.Log("worker"), "job completed"), 0) << "it does not know";
  network.SwallowAnswersTo("");
  network.Reset();
  EXPECT_TRUE(WaitUntil([&] { return Count(service.Log("worker"), "job completed") == 1; }));
  ASSERT_OK_AND_ASSIGN(const Job after, service.client().GetJob(created.name()));
  EXPECT_EQ(after.etag(), finished.etag()) << "the second completion changed nothing";
  EXPECT_EQ(after.attempt(), 1);
  EXPECT_EQ(Count(service.Log("coordinator"), "what=succeeded"), 1);
}

class ClockJumpTest : public PartitionTest {
 protected:
  void SetUp() override {
    for (const auto& folder : std::filesystem::directory_iterator("/usr/lib")) {
      const std::filesystem::path library = folder.path() / "faketime/libfaketimeMT.so.1";
      if (std::filesystem::exists(library)) library_ = library;
    }
    if (library_.empty()) GTEST_SKIP() << "needs libfaketime";
    Jump("+0");
  }

  // As somebody who sets the clock does: time since the start of the machine goes on.
  std::map<std::string, std::string> FakedClock(std::map<std::string, std::string> others) const {
    std::string& preload = others["LD_PRELOAD"];
    preload = preload.empty() ? library_ : absl::StrCat(library_, ":", preload);
    others.insert({{"FAKETIME_TIMESTAMP_FILE", dir_ / "clock"},
                   {"FAKETIME_NO_CACHE", "1"},
                   {"NO_FAKE_STAT", "1"},  // files do not jump
                   {"FAKETIME_DONT_FAKE_MONOTONIC", "1"}});
    return others;
  }
  void Jump(const std::string& offset) const {
    std::ofstream(dir_ / "clock.new") << offset << "\n";
    std::filesystem::rename(dir_ / "clock.new", dir_ / "clock");
  }

  std::string library_;
};

TEST_F(ClockJumpTest, B7LeasesLastAsLongAsTheyShould) {
  ServiceFixture service(Options());
  service.set_launch("coordinator", {.environment = FakedClock({})});
  service.set_launch("worker", {.environment = FakedClock(disk_.environment())});
  ASSERT_OK(service.Start());
  SlowDown();
  ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request("worked-on")));
  ASSERT_TRUE(IsRunning(service, created.name()));
  Jump("+1h");
  ASSERT_TRUE(WaitUntil([&] {
    const auto job = service.client().GetJob(created.name());
    return job.ok() && job->progress().layers_done() >= 3;
  }));
  Jump("-1h");
  ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 1) << "no lease ended early";

  Jump("+0");
  ASSERT_OK_AND_ASSIGN(const Job left, service.client().CreateJob(job_.Request("left-alone")));
  ASSERT_TRUE(IsRunning(service, left.name()));
  service.SignalWorker(SIGSTOP);
  const absl::Time start = absl::Now();
  Jump("-1h");
  ASSERT_TRUE(WaitUntil([&] {
    const auto job = service.client().GetJob(left.name());
    return job.ok() && job->state() == Job::QUEUED;
  }));
  const absl::Duration took = absl::Now() - start;
  EXPECT_GT(took, absl::Seconds(kLeaseSeconds - 2)) << "a heartbeat may be a second old";
  EXPECT_LT(took, absl::Seconds(kLeaseSeconds + 1));
}

}  // namespace
}  // namespace walsh
