// Goal:   an accepted job survives the death of any process, and a watcher sees all of it once.
// Method: kill -9 of the worker and of the coordinator at several moments of real jobs.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "tests/testing/s3_server.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::S3Server;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TestModel;
using Job = v1::QuantizationJob;

const TestModel& Model() {
  static const TestModel model;
  return model;
}

// Long enough to be killed in the middle, short enough for a test.
absl::StatusOr<Job> CreateSlowJob(ServiceFixture& service, const std::string& name) {
  v1::CreateQuantizationJobRequest request;
  Job& job = *request.mutable_quantization_job();
  job.set_source_model(Model().path());
  job.set_model_name(name);
  v1::QuantizationConfig& config = *job.mutable_config();
  config.set_bits(2);
  config.mutable_calibration()->set_uri(Model().text_path());
  config.mutable_calibration()->set_num_samples(256);
  config.mutable_calibration()->set_sequence_length(256);
  config.mutable_evaluation()->set_disable(true);
  return service.client().CreateJob(request);
}

testing::ServiceOptions Options() {
  testing::ServiceOptions options;
  options.model_roots = {Model().root()};
  return options;
}

// Nobody loses a lease because this machine is busy: for tests that count attempts. A worker that
// is killed is replaced at its address, which ends its lease at once.
testing::ServiceOptions LongLeases() {
  testing::ServiceOptions options = Options();
  options.lease_seconds = 60;
  return options;
}

// Watches a job on a thread and checks, event by event, that nothing is missing or repeated.
class Watcher {
 public:
  Watcher(client::Client* client, const std::string& name)
      : thread_([this, client, name] {
          client::WatchObserver observer;
          observer.on_event = [this](const v1::QuantizationJobEvent& event) {
            if (event.heartbeat()) return;
            EXPECT_EQ(event.sequence(), last_sequence_ + 1);
            last_sequence_ = event.sequence();
            stage_ = event.stage();
            attempt_ = event.attempt();
            layer_ = event.layer();
            if (event.layer() >= 0) first_layers_.try_emplace(event.attempt(), event.layer());
            messages_.push_back(event.message());
          };
          observer.on_disconnect = [this](const absl::Status&, absl::Duration) {
            ++n_disconnects_;
          };
          job_ = client->WatchJob(name, 0, observer);
        }) {}
  ~Watcher() {
    if (thread_.joinable()) thread_.join();
  }

  bool WaitForStage(Job::Stage stage) {
    return testing::WaitUntil([&] { return stage_ >= stage; }, absl::Minutes(2));
  }
  bool WaitForLayer(int layer) {
    return testing::WaitUntil([&] { return layer_ >= layer; }, absl::Minutes(2));
  }
  absl::StatusOr<Job> Join() {
    thread_.join();
    return job_;
  }
  int n_disconnects() const { return n_disconnects_; }
  // Of all events; after Join.
  const std::vector<std::string>& messages() const { return messages_; }
  // That an attempt worked on, -1: none; after Join.
  int first_layer(int attempt) const {
    const auto found = first_layers_.find(attempt);
    return found == first_layers_.end() ? -1 : found->second;
  }

 private:
  std::atomic<int64_t> last_sequence_{0};
  std::atomic<int> stage_{0};
  std::atomic<int> attempt_{0};
  std::atomic<int> layer_{-1};
  std::map<int, int> first_layers_;
  std::atomic<int> n_disconnects_{0};
  std::vector<std::string> messages_;
  absl::StatusOr<Job> job_;
  std::thread thread_;
};

TEST(DurabilityTest, AJobSurvivesAKilledWorker) {
  ServiceFixture service(LongLeases());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  Watcher watcher(&service.client(), created.name());
  ASSERT_TRUE(watcher.WaitForStage(Job::CALIBRATING));
  service.KillWorker();
  ASSERT_OK(service.StartWorker());
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 2);
  EXPECT_EQ(watcher.n_disconnects(), 0);
  EXPECT_OK(service.client().LoadModel("m"));
}

// What the second worker has of the first are the checkpoints alone.
void ExpectAnotherWorkerToGoOn(const std::string& checkpoints,
                               const std::map<std::string, std::string>& environment) {
  const testing::TempDir directory;
  testing::ServiceOptions options = LongLeases();
  options.worker_data_dir = directory / "worker";
  options.worker_flags = {"--checkpoint-dir", checkpoints};
  options.environment = environment;
  ServiceFixture service(options);
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job undisturbed, CreateSlowJob(service, "undisturbed"));
  ASSERT_OK_AND_ASSIGN(const Job expected, service.client().WatchJob(undisturbed.name(), 0, {}));
  ASSERT_EQ(expected.state(), Job::SUCCEEDED) << expected.DebugString();

  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  Watcher watcher(&service.client(), created.name());
  const int last_layer = Model().n_layers() - 1;
  ASSERT_TRUE(watcher.WaitForLayer(last_layer));
  service.KillWorker();
  ASSERT_OK(RemoveTree(options.worker_data_dir));
  ASSERT_OK(service.StartWorker());
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  ASSERT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 2);
  // −1: the kill came after the last layer's checkpoint.
  EXPECT_THAT(watcher.first_layer(2), AnyOf(last_layer, -1)) << "at most one layer is done twice";
  EXPECT_THAT(watcher.messages(), Contains(HasSubstr("layers done by an earlier run: ")));
  EXPECT_EQ(finished.result().sha256(), expected.result().sha256());
  ASSERT_OK(service.StopWorker())
      << "it removes the checkpoint once the coordinator has the outcome";
}

TEST(DurabilityTest, AnotherWorkerGoesOnAtTheNextLayerToTheSameBytes) {
  const testing::TempDir checkpoints;
  ASSERT_NO_FATAL_FAILURE(ExpectAnotherWorkerToGoOn(checkpoints.path(), {}));
  EXPECT_TRUE(std::filesystem::is_empty(checkpoints.path()));
}

TEST(DurabilityTest, AnotherWorkerGoesOnFromABucket) {
  WALSH_REQUIRE_S3();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<S3Server> s3, S3Server::Start());
  ASSERT_NO_FATAL_FAILURE(
      ExpectAnotherWorkerToGoOn(absl::StrCat("s3://", S3Server::kBucket), s3->environment()));
}

TEST(DurabilityTest, AJobSurvivesAKilledCoordinatorAndItsWatchHasNoGap) {
  ServiceFixture service(LongLeases());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  // The fixture makes a new client with each coordinator; this one lives through it.
  client::ClientOptions options;
  options.address = service.endpoint("coordinator", "grpc");
  client::Client client(options);
  Watcher watcher(&client, created.name());
  ASSERT_TRUE(watcher.WaitForStage(Job::CALIBRATING));
  service.KillCoordinator();
  ASSERT_OK(service.StartCoordinator());
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 1) << "the worker went on";
  EXPECT_GE(watcher.n_disconnects(), 1);
  EXPECT_OK(service.client().LoadModel("m"));
}

TEST(DurabilityTest, AJobSurvivesBothAtOnce) {
  ServiceFixture service(Options());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  client::ClientOptions options;
  options.address = service.endpoint("coordinator", "grpc");
  client::Client client(options);
  Watcher watcher(&client, created.name());
  ASSERT_TRUE(watcher.WaitForStage(Job::LOADING));
  service.KillCoordinator();
  service.KillWorker();
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
}

// That it is on the disk, and not only with the kernel, is for NoSuccessWithoutACleanSync to show.
TEST(DurabilityTest, AnAcceptedJobIsThereAfterAKillRightAfterItsAnswer) {
  ServiceFixture service(Options());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  service.KillCoordinator();
  ASSERT_OK(service.StartCoordinator());
  ASSERT_OK_AND_ASSIGN(const Job found, service.client().GetJob(created.name()));
  EXPECT_EQ(found.model_name(), "m");
  ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
}

TEST(DurabilityTest, AWorkerThatIsStoppedReturnsItsJobWithoutACrash) {
  ServiceFixture service(LongLeases());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  Watcher watcher(&service.client(), created.name());
  ASSERT_TRUE(watcher.WaitForStage(Job::CALIBRATING));
  ASSERT_OK(service.StopWorker());
  ASSERT_OK_AND_ASSIGN(const Job returned, service.client().GetJob(created.name()));
  EXPECT_EQ(returned.state(), Job::QUEUED) << "at once, not when a lease ends";
  ASSERT_OK(service.StartWorker());
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 2);
  const std::vector<std::string> messages = watcher.messages();
  EXPECT_THAT(messages, Contains(HasSubstr("returned to the queue by its worker")));
  EXPECT_THAT(messages, Not(Contains(HasSubstr("vanished"))));
  EXPECT_THAT(messages, Contains(HasSubstr("layers done by an earlier run: ")))
      << "it has finished the layer that it was in";
}

TEST(DurabilityTest, ACancelledJobEndsAndLeavesNoModel) {
  ServiceFixture service(Options());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  Watcher watcher(&service.client(), created.name());
  ASSERT_TRUE(watcher.WaitForStage(Job::CALIBRATING));
  ASSERT_OK(service.client().CancelJob(created.name()));
  ASSERT_OK_AND_ASSIGN(const Job finished, watcher.Join());
  EXPECT_EQ(finished.state(), Job::CANCELLED) << finished.DebugString();
  ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, service.client().ListModels());
  EXPECT_EQ(models.models_size(), 0);
  EXPECT_OK(service.client().DeleteJob(created.name()));
}

TEST(DurabilityTest, AStreamWhoseWorkerDiesEndsWithAnError) {
  ServiceFixture service(Options());
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job created, CreateSlowJob(service, "m"));
  ASSERT_OK(service.client().WatchJob(created.name(), 0, {}));
  ASSERT_OK(service.client().LoadModel("m"));
  v1::GenerateRequest request;
  request.set_model("m");
  request.set_prompt("Once upon a time");
  request.mutable_sampling()->set_max_tokens(400);
  request.mutable_sampling()->set_ignore_eos(true);
  bool killed = false;
  const absl::Status status =
      service.client().GenerateStream(request, [&](const v1::GenerateStreamResponse& event) {
        if (!event.has_delta() || killed) return;
        service.KillWorker();
        killed = true;
      });
  EXPECT_THAT(status, testing::HasCode(absl::StatusCode::kUnavailable));
}

}  // namespace
}  // namespace walsh
