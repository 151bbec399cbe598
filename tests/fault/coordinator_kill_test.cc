// kill -9 of the real coordinator while clients submit: what was acknowledged is there afterwards,
// once, and nothing that was refused is.
#include <grpcpp/client_context.h>
#include <signal.h>

#include <atomic>
#include <cstdlib>
#include <map>
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

// strace counts calls for each thread, so some points are never reached.
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

// At the K-th call that makes something durable, for many K: between any two of them.
TEST_F(CoordinatorKillTest, AcknowledgedJobsSurviveAKillAtEachPersistentStep) {
  if (std::system("strace -o /dev/null true > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "strace is missing or may not trace here";
  }
  for (const char* call : {"fdatasync", "pwrite64"}) {
    for (int k = 1; k <= 33; k += 4) {
      const std::string inject =
          std::string("inject=") + call + ":signal=KILL:when=" + std::to_string(k);
      DaemonProcess daemon("coordinator", DataDir(), kFreePorts,
                           {"/usr/bin/env", "strace", "-f", "-o", "/dev/null", "-e",
                            std::string("trace=") + call, "-e", inject});
      const absl::StatusOr<Endpoints> endpoints = daemon.WaitUntilReady();
      // The step may have come during start.
      if (endpoints.ok()) {
        SubmitUntilGone(Connect(*endpoints).get(), std::string(call) + "-" + std::to_string(k));
      }
      daemon.Kill();
      ++n_kills_;
    }
  }
  EXPECT_GT(acknowledged_.size(), 0u);
  CheckRecovery("after a kill at each step");
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
