// Goal:   in a fleet of unlike workers a job ends up with one that can run it.
// Method: a real coordinator and whole workers in one process, over loopback: one on a device that
//         refuses or breaks as a test says, one on the CPU that does the work.
#include <fstream>

#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/service/fake_backend.h"
#include "worker/kernels/device_failure.h"
#include "worker/kernels/kernels.h"
#include "worker/service/daemon.h"

namespace walsh {
namespace {

using service::Daemon;
using service::FakeDevice;
using service::WorkerOptions;
using ::testing::HasSubstr;
using v1::QuantizationJob;
using v1::QuantizationJobEvent;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

class MixedFleetTest : public CoordinatorFixture {
 protected:
  // Loads OpenBLAS, which is configured through the environment, before other threads run.
  static void SetUpTestSuite() { (void)kernels::DescribeCpuBackend(); }

  void SetUp() override {
    CoordinatorFixture::SetUp();
    TinyModel({}).WriteHf(dir_ / "tiny");
    std::ofstream text(dir_ / "text.txt");
    for (int i = 0; i < 400; ++i) text << "Row " << i << " changes its sign " << i * i % 53 << ". ";
  }

  std::unique_ptr<Daemon> StartWorker(const std::string& device) {
    WorkerOptions options;
    options.coordinator = server_->endpoints().at("internal");
    options.grpc_port = options.metrics_port = 0;
    options.data_dir = dir_ / ("worker-" + device);
    options.model_roots = {dir_.path()};
    options.device = device;
    options.threads = 1;
    absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Start(
        options, {.cuda = FakeCudaDevices(&device_), .on_device_broken = [this] { ++n_broken_; }});
    EXPECT_OK(daemon);
    return daemon.ok() ? *std::move(daemon) : nullptr;
  }
  v1::ListWorkersResponse Workers() {
    return Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                         v1::ListWorkersRequest())
        .value_or(v1::ListWorkersResponse());
  }
  void AwaitWorkers(int n) {
    EXPECT_TRUE(WaitUntil([&] { return Workers().workers_size() == n; }));
  }

  v1::CreateQuantizationJobRequest TinyJob(const std::string& id) const {
    v1::CreateQuantizationJobRequest request = NewJob(id);
    QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(dir_ / "tiny");
    v1::QuantizationConfig& config = *job.mutable_config();
    config.mutable_calibration()->set_uri(dir_ / "text.txt");
    config.mutable_calibration()->set_num_samples(4);
    config.mutable_calibration()->set_sequence_length(64);
    config.mutable_evaluation()->set_disable(true);
    return request;
  }
  bool IsInState(const std::string& id, QuantizationJob::State state) {
    const absl::StatusOr<QuantizationJob> job = Get(id);
    return job.ok() && job->state() == state;
  }
  // The message of the event with which the job goes back to the queue.
  std::string AwaitReturn(const std::string& id) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(1)));
    v1::WatchQuantizationJobRequest request;
    request.set_name("quantizationJobs/" + id);
    const auto reader = jobs_->WatchQuantizationJob(&context, request);
    QuantizationJobEvent event;
    while (reader->Read(&event)) {
      if (event.state() == QuantizationJob::QUEUED && event.attempt() == 1) break;
    }
    const std::string message = event.message();
    context.TryCancel();
    while (reader->Read(&event)) {
    }
    reader->Finish();
    return message;
  }

  FakeDevice device_;
  std::atomic<int> n_broken_ = 0;
};

TEST_F(MixedFleetTest, AJobThatOneWorkerRefusesIsRunByTheOther) {
  ASSERT_OK(Create(TinyJob("a")));  // nobody is there to look at it
  device_.needs.device_bytes = int64_t{81} << 30;
  const std::unique_ptr<Daemon> small = StartWorker("cuda:0");
  EXPECT_THAT(AwaitReturn("a"),
              HasSubstr("cannot run it: FAILED_PRECONDITION: the job needs 86973087744 bytes of "
                        "device memory, cuda:0 NVIDIA H200 has 85899345920"));
  const std::unique_ptr<Daemon> cpu = StartWorker("cpu");
  EXPECT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::SUCCEEDED); }));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Get("a"));
  EXPECT_EQ(job.result().device(), "cpu");
  EXPECT_EQ(job.attempt(), 2) << "each worker was offered it once";
}

TEST_F(MixedFleetTest, AJobThatOnlyOneWorkerTakesIsAcceptedAndRunByIt) {
  device_.supported = absl::UnimplementedError("head_dim 16: not on this device");
  const std::unique_ptr<Daemon> gpu = StartWorker("cuda:0");
  AwaitWorkers(1);
  v1::CreateQuantizationJobRequest request = TinyJob("a");
  EXPECT_THAT(Create(request), testing::StatusIs(absl::StatusCode::kUnimplemented,
                                                 HasSubstr("head_dim 16: not on this device")));
  const std::unique_ptr<Daemon> cpu = StartWorker("cpu");
  AwaitWorkers(2);
  request.set_validate_only(true);
  ASSERT_OK_AND_ASSIGN(const QuantizationJob validated, Create(request));
  EXPECT_EQ(validated.preflight().device(), "cpu");
  EXPECT_GT(validated.preflight().memory().bytes_needed(), 0);
  EXPECT_GT(validated.preflight().memory().bytes_free(), 0);
  EXPECT_FALSE(validated.preflight().has_device_memory());
  request.set_validate_only(false);
  ASSERT_OK(Create(request));
  EXPECT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::SUCCEEDED); }));
  EXPECT_EQ(Get("a")->result().device(), "cpu");
}

TEST_F(MixedFleetTest, AJobWhoseWorkersDeviceBreaksIsRunByTheOther) {
  device_.quantize = [] { return MarkDeviceBroken(absl::InternalError("an illegal address")); };
  const std::unique_ptr<Daemon> broken = StartWorker("cuda:0");
  AwaitWorkers(1);
  ASSERT_OK(Create(TinyJob("a")));
  EXPECT_THAT(AwaitReturn("a"), HasSubstr("UNAVAILABLE: cuda:0 NVIDIA H200 is broken"));
  EXPECT_EQ(n_broken_, 1);
  EXPECT_TRUE(WaitUntil([&] {
    const v1::ListWorkersResponse workers = Workers();
    return workers.workers_size() == 1 && workers.workers(0).state() == v1::Worker::DRAINING;
  }));
  const std::unique_ptr<Daemon> cpu = StartWorker("cpu");
  // After the pause of a retry.
  EXPECT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::SUCCEEDED); }));
  EXPECT_EQ(Get("a")->result().device(), "cpu");
  EXPECT_EQ(Get("a")->attempt(), 2);
}

}  // namespace
}  // namespace walsh
