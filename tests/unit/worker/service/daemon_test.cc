// A whole worker in the test's process, on a device that breaks.
#include "worker/service/daemon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>

#include "common/endpoints.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/testing/fake_coordinator.h"
#include "tests/testing/http_get.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"
#include "tests/unit/worker/service/fake_backend.h"
#include "worker/kernels/device_failure.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::FakeCoordinator;
using ::walsh::testing::HttpGet;
using ::walsh::testing::MetricValue;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;
using Complete = internal::v1::CompleteJobRequest;
using Record = FakeCoordinator::Record;
using ServingStatus = grpc::health::v1::HealthCheckResponse;

class WorkerDaemonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyModel({}).WriteHf(dir_ / "tiny");
    std::ofstream text(dir_ / "text.txt");
    for (int i = 0; i < 400; ++i) text << "Row " << i << " changes its sign " << i * i % 53 << ". ";
  }

  WorkerOptions Options() const {
    WorkerOptions options;
    options.coordinator = coordinator_.address();
    options.grpc_port = 0;
    options.metrics_port = 0;
    options.data_dir = dir_ / "data";
    options.model_roots = {dir_.path()};
    options.device = "cuda:0";
    options.threads = 1;
    return options;
  }

  v1::QuantizationJob Job(const std::string& id) const {
    v1::QuantizationJob job;
    job.set_name(JobName(id));
    job.set_model_name("m");
    job.set_source_model(dir_ / "tiny");
    v1::QuantizationConfig& config = *job.mutable_config();
    config.mutable_calibration()->set_uri(dir_ / "text.txt");
    config.mutable_calibration()->set_num_samples(4);
    config.mutable_calibration()->set_sequence_length(64);
    config.mutable_evaluation()->set_disable(true);
    return job;
  }

  Complete AwaitOutcome(size_t n = 1) {
    EXPECT_TRUE(coordinator_.WaitFor([n](const Record& r) { return r.completions.size() >= n; }));
    const Record record = coordinator_.record();
    return record.completions.size() >= n ? record.completions[n - 1] : Complete();
  }

  ServingStatus::ServingStatus Health(const std::string& address) const {
    const auto stub = grpc::health::v1::Health::NewStub(MakeChannel(address));
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    ServingStatus response;
    EXPECT_TRUE(stub->Check(&context, request, &response).ok());
    return response.status();
  }

  const testing::TempDir dir_;
  FakeCoordinator coordinator_{{.heartbeat_interval = absl::Milliseconds(10)}};
  FakeDevice device_;
};

TEST_F(WorkerDaemonTest, ABrokenDeviceEndsItsWork) {
  device_.quantize = [] { return MarkDeviceBroken(absl::InternalError("an illegal address")); };
  std::atomic<int> n_told = 0;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Daemon> daemon,
                       Daemon::Start(Options(), {.cuda = FakeCudaDevices(&device_),
                                                 .on_device_broken = [&] { ++n_told; }}));
  ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, ReadEndpoints(dir_ / "data", "worker"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  EXPECT_THAT(coordinator_.record().registrations[0].device(),
              HasSubstr("cuda:0 NVIDIA H200, host cpu ("));
  EXPECT_TRUE(WaitUntil([&] { return HttpGet(endpoints.at("metrics"), "/readyz").ok(); }));
  EXPECT_EQ(Health(endpoints.at("grpc")), ServingStatus::SERVING);
  EXPECT_EQ(MetricValue("walsh_worker_gpu_memory_bytes",
                        {"device=\"cuda:0 NVIDIA H200\"", "kind=\"free\""}),
            static_cast<double>(int64_t{79} << 30));

  coordinator_.Offer(Job("j"));
  const Complete outcome = AwaitOutcome();
  EXPECT_EQ(outcome.error_reason(), "DEVICE_BROKEN") << outcome.DebugString();
  EXPECT_EQ(n_told, 1);
  EXPECT_EQ(Health(endpoints.at("grpc")), ServingStatus::NOT_SERVING);
  for (const char* path : {"/livez", "/readyz"}) {
    EXPECT_THAT(
        HttpGet(endpoints.at("metrics"), path),
        StatusIs(absl::StatusCode::kUnavailable, HasSubstr("cuda:0 NVIDIA H200 is broken")));
  }
  daemon->Stop();
  EXPECT_EQ(coordinator_.record().goodbyes.size(), 1u);
}

TEST_F(WorkerDaemonTest, AFolderForCheckpointsThatCannotBeIsToldAtOnce) {
  WorkerOptions options = Options();
  options.checkpoint_dir = "/proc/checkpoints";
  EXPECT_THAT(Daemon::Start(options, {.cuda = FakeCudaDevices(&device_)}).status().message(),
              HasSubstr("--checkpoint-dir"));
}

// Set before the threads of the fixture run.
struct BucketThatIsAway {
  const ScopedEnvironment endpoint{"AWS_ENDPOINT_URL", "http://127.0.0.1:1"};
  const ScopedEnvironment id{"AWS_ACCESS_KEY_ID", "id"};
  const ScopedEnvironment key{"AWS_SECRET_ACCESS_KEY", "key"};
};
class BucketThatIsAwayTest : private BucketThatIsAway, public WorkerDaemonTest {};

TEST_F(BucketThatIsAwayTest, KeepsNoWorkerFromStartingOrStopping) {
  WorkerOptions options = Options();
  options.checkpoint_dir = options.artifact_store = "s3://bucket/walsh";
  options.model_url_prefixes = {"s3://bucket/models"};
  const absl::Time start = absl::Now();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Daemon> daemon,
                       Daemon::Start(options, {.cuda = FakeCudaDevices(&device_)}));
  daemon->Stop();
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

// Seen by a coordinator's check while no job runs: the worker must not wait for one to find it
// again.
TEST_F(WorkerDaemonTest, ADeviceThatIsFoundBrokenTakesNoMoreLeases) {
  device_.memory = MarkDeviceBroken(absl::InternalError("fell off the bus"));
  std::atomic<int> n_told = 0;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Daemon> daemon,
                       Daemon::Start(Options(), {.cuda = FakeCudaDevices(&device_),
                                                 .on_device_broken = [&] { ++n_told; }}));
  ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, ReadEndpoints(dir_ / "data", "worker"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  const auto host = internal::v1::ModelHostService::NewStub(MakeChannel(endpoints.at("grpc")));
  internal::v1::ValidateJobRequest request;
  *request.mutable_job() = Job("j");
  for (int i = 0; i < 2; ++i) {
    internal::v1::ValidateJobResponse response;
    grpc::ClientContext context;
    const absl::Status refused = FromGrpcStatus(host->ValidateJob(&context, request, &response));
    EXPECT_EQ(ErrorReason(refused), "DEVICE_BROKEN") << refused;
  }
  EXPECT_EQ(n_told, 1);
  EXPECT_EQ(Health(endpoints.at("grpc")), ServingStatus::NOT_SERVING);
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.heartbeats.back().draining(); }));
  const size_t n_heartbeats = coordinator_.record().heartbeats.size();
  ASSERT_TRUE(coordinator_.WaitFor(
      [&](const Record& r) { return r.heartbeats.size() > n_heartbeats + 10; }));
  EXPECT_TRUE(coordinator_.record().completions.empty()) << "the job is for another worker";
}

TEST_F(WorkerDaemonTest, AFullDeviceDoesNot) {
  std::atomic<int> n_jobs = 0;
  device_.quantize = [&] {
    return ++n_jobs == 1 ? absl::ResourceExhaustedError("5 bytes are needed, 4 are free")
                         : absl::DataLossError("tensor 'x' holds NaN");
  };
  device_.needs.device_bytes = int64_t{1} << 30;
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<Daemon> daemon,
      Daemon::Start(Options(), {.cuda = FakeCudaDevices(&device_),
                                .on_device_broken = [] { ADD_FAILURE() << "not broken"; }}));
  coordinator_.Offer(Job("j"));
  EXPECT_EQ(AwaitOutcome(1).error().code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  coordinator_.Offer(Job("k"));
  EXPECT_EQ(AwaitOutcome(2).error().code(), static_cast<int>(absl::StatusCode::kDataLoss));
  device_.needs.device_bytes = int64_t{81} << 30;
  coordinator_.Offer(Job("l"));
  EXPECT_EQ(AwaitOutcome(3).error_reason(), "INSUFFICIENT_MEMORY");
  EXPECT_TRUE(AwaitOutcome(3).refused());
  EXPECT_EQ(n_jobs, 2);
}

TEST_F(WorkerDaemonTest, ADeviceThatCannotBeUsedIsAStartThatFails) {
  device_.opened = absl::FailedPreconditionError("the driver is too old");
  const Surroundings surroundings{.cuda = FakeCudaDevices(&device_)};
  EXPECT_THAT(Daemon::Start(Options(), surroundings),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("--device cuda:0: the driver is too old")));
  WorkerOptions options = Options();
  options.device = "auto";
  EXPECT_OK(Daemon::Start(options, surroundings));
}

using WorkerDaemonDeathTest = WorkerDaemonTest;

TEST_F(WorkerDaemonDeathTest, ABrokenDeviceHasAnExitCodeOfItsOwn) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  device_.quantize = [] { return MarkDeviceBroken(absl::InternalError("an illegal address")); };
  coordinator_.Offer(Job("j"));
  WorkerOptions options = Options();
  options.shutdown_timeout_seconds = 3600;  // for requests; there are none
  const absl::Time start = absl::Now();
  EXPECT_EXIT(std::exit(RunUntilSignal(options, FakeCudaDevices(&device_))),
              ::testing::ExitedWithCode(kExitDeviceBroken),
              "this worker stops.*an illegal address(.|\n)*stopped");
  EXPECT_LT(absl::Now() - start, absl::Minutes(2));
}

}  // namespace
}  // namespace walsh::service
