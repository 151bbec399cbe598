// Goal:   daemons as an operator sees them: what a start loads, what a stop waits for, and what a
//         second signal does not wait for.
// Method: the real daemons with a small quantized model; signals in the midst of streams.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TestModel;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

constexpr int kTokens = 400;

class DaemonTest : public ::testing::Test {
 protected:
  static testing::ServiceOptions Options(const TestModel& model) {
    testing::ServiceOptions options;
    options.model_roots = {model.root()};
    options.worker_flags = {"--load-model", "m"};
    return options;
  }

  // The service, and a worker that has loaded the model when it started.
  void SetUp() override {
    ASSERT_OK(service_.Start());
    v1::CreateQuantizationJobRequest request;
    Job& job = *request.mutable_quantization_job();
    job.set_source_model(model_.path());
    job.set_model_name("m");
    job.mutable_config()->set_method(v1::QuantizationConfig::RTN);
    job.mutable_config()->mutable_rotation()->set_kind(v1::Rotation::NONE);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    ASSERT_OK_AND_ASSIGN(const Job created, service_.client().CreateJob(request));
    ASSERT_OK_AND_ASSIGN(const Job finished, service_.client().WatchJob(created.name(), 0, {}));
    ASSERT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
    EXPECT_THAT(service_.Log("worker"), HasSubstr("no such model to load at start"));
    ASSERT_OK(service_.StopWorker());
    ASSERT_OK(service_.StartWorker());
    ASSERT_TRUE(WaitUntil([this] {
      const auto model = service_.client().GetModel("m");
      return model.ok() && model->state() == v1::Model::READY;
    })) << "--load-model";
  }

  void TearDown() override {
    for (std::thread& stream : streams_) stream.join();
  }

  // Starts streams of kTokens tokens; returns when each has some.
  void StartStreams(int n_streams) {
    statuses_.resize(n_streams);
    n_tokens_.resize(n_streams);
    n_begun_ = 0;
    for (int i = 0; i < n_streams; ++i) {
      streams_.emplace_back([this, i, has_begun = false]() mutable {
        const auto begin = [&] {
          if (!std::exchange(has_begun, true)) ++n_begun_;
        };
        v1::GenerateRequest request;
        request.set_model("m");
        request.set_prompt("Once upon a time");
        request.mutable_sampling()->set_max_tokens(kTokens);
        request.mutable_sampling()->set_ignore_eos(true);
        statuses_[i] =
            service_.client().GenerateStream(request, [&](const v1::GenerateStreamResponse& event) {
              n_tokens_[i] += event.delta().token_ids_size();
              if (event.has_delta()) begin();
            });
        begin();
      });
    }
    ASSERT_TRUE(WaitUntil([&] { return n_begun_ == n_streams; }));
  }
  // Two signals, the second while the first one's stop is under way: what it waits for must not end
  // by itself.
  void StopAndStopAgain(const std::string& daemon) {
    const size_t n_logged = service_.Log(daemon).size();
    service_.Signal(daemon, SIGTERM);
    ASSERT_TRUE(WaitUntil(
        [&] { return service_.Log(daemon).find(" stopping", n_logged) != std::string::npos; }));
    service_.Signal(daemon, SIGTERM);
    ASSERT_OK_AND_ASSIGN(const int exit_code, service_.WaitForExit(daemon, absl::Seconds(10)));
    EXPECT_EQ(exit_code, 1);
  }
  void JoinStreams() {
    for (std::thread& stream : streams_) stream.join();
    streams_.clear();
  }

  const TestModel model_;
  ServiceFixture service_{Options(model_)};
  std::vector<std::thread> streams_;
  std::vector<absl::Status> statuses_;
  std::vector<int> n_tokens_;
  std::atomic<int> n_begun_ = 0;
};

TEST_F(DaemonTest, AStoppedWorkerFinishesWhatItHasBegun) {
  StartStreams(8);
  EXPECT_OK(service_.StopWorker());
  JoinStreams();
  for (size_t i = 0; i < statuses_.size(); ++i) {
    EXPECT_OK(statuses_[i]);
    EXPECT_EQ(n_tokens_[i], kTokens) << i;
  }
}

TEST_F(DaemonTest, ASecondSignalEndsTheWorkerAtOnce) {
  StartStreams(16);
  // Both signals wait for the frozen worker, so that it has the second one before it could have
  // finished the streams. They are two kinds, because a signal that waits swallows its like.
  service_.SignalWorker(SIGSTOP);
  service_.SignalWorker(SIGTERM);
  service_.SignalWorker(SIGINT);
  service_.SignalWorker(SIGCONT);
  ASSERT_OK_AND_ASSIGN(const int exit_code, service_.WaitForExit("worker", absl::Seconds(10)));
  EXPECT_EQ(exit_code, 1);
  EXPECT_THAT(service_.Log("worker"), HasSubstr("second signal"));
  JoinStreams();
}

TEST(QuietDaemonTest, DaemonsThatLogErrorsOnlyRunAllTheSame) {
  ServiceFixture service(
      {.coordinator_flags = {"--log-level", "error"}, .worker_flags = {"--log-level", "error"}});
  ASSERT_OK(service.Start());
  EXPECT_OK(service.client().ListWorkers());
  EXPECT_OK(service.StopWorker());
  EXPECT_OK(service.StopCoordinator());
}

TEST_F(DaemonTest, ASecondSignalEndsTheCoordinatorAtOnce) {
  StartStreams(4);
  service_.SignalWorker(SIGSTOP);  // its streams stand still
  StopAndStopAgain("coordinator");
  JoinStreams();
  service_.KillWorker();
}

}  // namespace
}  // namespace walsh
