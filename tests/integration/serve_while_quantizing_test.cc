// Goal:   jobs and requests on one worker are to each other what --serve-while-quantizing says.
// Method: a real coordinator and a whole worker in one process, over loopback. Jobs are real ones
//         on the CPU; a loaded model is a fake whose steps stand still until a test lets them go,
//         so that a request lasts as long as the test wants.
#include <grpcpp/client_context.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "absl/strings/str_split.h"
#include "common/metrics.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/fake_model.h"
#include "tests/testing/tiny_model.h"
#include "worker/kernels/kernels.h"
#include "worker/pipeline/backend.h"
#include "worker/service/daemon.h"

namespace walsh {
namespace {

using service::Daemon;
using service::WorkerOptions;
using ::testing::HasSubstr;
using v1::Model;
using v1::QuantizationJob;
using ::walsh::testing::FakeModel;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

// The CPU's, whose layers wait until they may begin.
class GatedBackend final : public pipeline::Backend {
 public:
  explicit GatedBackend(const std::atomic<bool>* is_open) : is_open_(is_open) {}

  std::string name() const override { return cpu_->name(); }
  pipeline::MemoryNeeds Needs(const pipeline::JobSpec& spec, const ModelConfig& config,
                              const pipeline::ResolvedJob& job) const override {
    return cpu_->Needs(spec, config, job);
  }
  absl::StatusOr<pipeline::DeviceMemory> memory() const override { return cpu_->memory(); }
  absl::Status CheckSupported(const ModelConfig& config,
                              const pipeline::ResolvedJob& job) const override {
    return cpu_->CheckSupported(config, job);
  }
  absl::StatusOr<double> CheckRotation(const pipeline::JobInputs& inputs,
                                       const calibrate::TokenWindows& windows,
                                       pipeline::Progress& progress) override {
    return cpu_->CheckRotation(inputs, windows, progress);
  }
  absl::Status Quantize(const pipeline::JobInputs& inputs, const calibrate::TokenWindows& windows,
                        ArtifactWriter& writer, pipeline::Progress& progress,
                        pipeline::JobReport& report) override {
    if (!WaitUntil([this] { return is_open_->load(); })) {
      return absl::InternalError("the gate stayed shut");
    }
    return cpu_->Quantize(inputs, windows, writer, progress, report);
  }
  absl::StatusOr<pipeline::Quality> Evaluate(const pipeline::JobInputs& inputs,
                                             const ArtifactReader& artifact,
                                             const calibrate::TokenWindows& windows,
                                             const evaluate::ScoredFrom& scored_from,
                                             pipeline::Progress& progress) override {
    return cpu_->Evaluate(inputs, artifact, windows, scored_from, progress);
  }
  pipeline::JobUse EndJob() override { return cpu_->EndJob(); }

 private:
  const std::unique_ptr<pipeline::Backend> cpu_ = pipeline::MakeCpuBackend();
  const std::atomic<bool>* const is_open_;
};

class ServeWhileQuantizingTest : public CoordinatorFixture {
 protected:
  // Loads OpenBLAS, which is configured through the environment, before other threads run.
  static void SetUpTestSuite() { (void)kernels::DescribeCpuBackend(); }

  void SetUp() override {
    CoordinatorFixture::SetUp();
    TinyModel({}).WriteHf(dir_ / "tiny");
    std::ofstream text(dir_ / "text.txt");
    for (int i = 0; i < 400; ++i) text << "Row " << i << " changes its sign " << i * i % 53 << ". ";
  }
  void TearDown() override {
    may_step_ = may_quantize_ = true;
    if (client_.joinable()) client_.join();
    worker_.reset();
  }

  // A worker that runs jobs on the CPU and has model "a-model" loaded.
  void StartWorker(const std::string& policy) {
    WorkerOptions options;
    options.coordinator = server_->endpoints().at("internal");
    options.grpc_port = options.metrics_port = 0;
    options.data_dir = dir_ / "worker";
    options.model_roots = {dir_.path()};
    options.device = "cuda:0";  // the fakes below
    options.threads = 1;
    options.serve_while_quantizing = policy;
    const service::CudaDevices devices = {
        .list = [] { return std::vector<kernels::cuda::DeviceInfo>(); },
        .open = [this](int) -> absl::StatusOr<std::unique_ptr<pipeline::Backend>> {
          return std::make_unique<GatedBackend>(&may_quantize_);
        },
        .load = [this](const std::string&, const engine::CudaModelOptions&)
            -> absl::StatusOr<std::shared_ptr<engine::ServedModel>> {
          return FakeModel::Create(
              {.max_position = 4096, .before_forward = [this](const auto&) {
                 const bool is_open = WaitUntil([this] { return may_step_.load(); });
                 return is_open ? absl::OkStatus() : absl::InternalError("it stayed shut");
               }});
        }};
    ASSERT_OK_AND_ASSIGN(
        worker_, Daemon::Start(options, {.cuda = devices, .on_device_broken = [] { FAIL(); }}));
    v1::CreateQuantizationJobRequest job = TinyJob("a");
    job.mutable_quantization_job()->mutable_config()->mutable_auto_load();
    ASSERT_OK(Create(job));
    ASSERT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::SUCCEEDED); }));
    ASSERT_EQ(StateOf("a-model"), Model::READY);
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

  Model::State StateOf(const std::string& model) {
    v1::GetModelRequest request;
    request.set_name("models/" + model);
    const auto found = Send<Model>(models_.get(), &ModelStub::GetModel, request);
    EXPECT_OK(found);
    return found.ok() ? found->state() : Model::STATE_UNSPECIFIED;
  }
  absl::StatusOr<Model> Load(const std::string& model) {
    v1::LoadModelRequest request;
    request.set_name("models/" + model);
    return Send<Model>(models_.get(), &ModelStub::LoadModel, request);
  }
  absl::StatusOr<Model> Unload(const std::string& model) {
    v1::UnloadModelRequest request;
    request.set_name("models/" + model);
    return Send<Model>(models_.get(), &ModelStub::UnloadModel, request);
  }

  // A request that streams until `may_step_`; returns when it runs.
  void BeginRequest() {
    may_step_ = false;
    client_ = std::thread([this] {
      v1::GenerateRequest request;
      request.set_model("a-model");
      request.set_prompt("Once");
      request.mutable_sampling()->set_max_tokens(20);
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(2)));
      const auto reader = generation_->GenerateStream(&context, request);
      v1::GenerateStreamResponse response;
      while (reader->Read(&response)) {
      }
      EXPECT_OK(FromGrpcStatus(reader->Finish()));
    });
    ASSERT_TRUE(WaitUntil([this] {
      const auto workers = Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                                         v1::ListWorkersRequest());
      return workers.ok() && workers->workers_size() == 1 &&
             workers->workers(0).requests_running() == 1;
    }));
  }
  void EndRequest() {
    may_step_ = true;
    client_.join();
  }

  // That jobs of this process have waited for requests.
  static double SecondsYielded() {
    for (const absl::string_view line : absl::StrSplit(metrics::Render(), '\n')) {
      const std::pair<std::string, std::string> parts = absl::StrSplit(line, ' ');
      if (parts.first == "walsh_quantization_yield_seconds_total") return std::stod(parts.second);
    }
    return 0;
  }

  std::atomic<bool> may_step_ = true;
  std::atomic<bool> may_quantize_ = true;
  std::unique_ptr<Daemon> worker_;
  std::thread client_;
};

TEST_F(ServeWhileQuantizingTest, UnderPreemptAJobStandsStillWhileARequestStreams) {
  StartWorker("preempt");
  const double before = SecondsYielded();
  BeginRequest();
  ASSERT_OK(Create(TinyJob("b")));
  // The report of what it did last comes on another thread.
  ASSERT_TRUE(WaitUntil([&] { return SecondsYielded() > before + 1; }));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob stopped, Get("b"));
  EXPECT_EQ(stopped.state(), QuantizationJob::RUNNING);
  // All of job "a" took less.
  ASSERT_TRUE(WaitUntil([&] { return SecondsYielded() > before + 4; }));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob still, Get("b"));
  EXPECT_EQ(still.state(), QuantizationJob::RUNNING);
  EXPECT_EQ(still.stage(), stopped.stage());
  EXPECT_EQ(still.progress().layers_done(), 0);
  EXPECT_EQ(still.progress().fraction(), stopped.progress().fraction());
  EndRequest();
  ASSERT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::SUCCEEDED); }));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Get("b"));
  EXPECT_EQ(job.attempt(), 1);
  ASSERT_EQ(job.result().step_times_size(), 1);
  EXPECT_EQ(job.result().step_times(0).name(), "yielded");
  EXPECT_GT(job.result().step_times(0).seconds(), 3);
  // The same model from the same source, with waits and without.
  EXPECT_EQ(job.result().sha256(), Get("a")->result().sha256());
}

TEST_F(ServeWhileQuantizingTest, AJobThatWaitsCanBeCancelled) {
  StartWorker("preempt");
  const double before = SecondsYielded();
  BeginRequest();
  ASSERT_OK(Create(TinyJob("b")));
  ASSERT_TRUE(WaitUntil([&] { return SecondsYielded() > before; }));
  ASSERT_OK(Cancel("quantizationJobs/b"));
  EXPECT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::CANCELLED); }));
  EndRequest();
}

TEST_F(ServeWhileQuantizingTest, UnderShareAJobEndsBesideARequestThatDoesNot) {
  StartWorker("share");
  const double before = SecondsYielded();
  BeginRequest();
  ASSERT_OK(Create(TinyJob("b")));
  EXPECT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::SUCCEEDED); }));
  EXPECT_GT(SecondsYielded(), before);
  EndRequest();
}

TEST_F(ServeWhileQuantizingTest, UnderExclusiveAJobWaitsForTheUnload) {
  StartWorker("exclusive");
  ASSERT_OK(Create(TinyJob("b")));
  EXPECT_FALSE(
      WaitUntil([&] { return !IsInState("b", QuantizationJob::QUEUED); }, absl::Seconds(2)));
  ASSERT_OK(Unload("a-model"));
  EXPECT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::SUCCEEDED); }));
  EXPECT_EQ(Get("b")->attempt(), 1) << "it was offered once, and not refused";
}

TEST_F(ServeWhileQuantizingTest, UnderExclusiveALoadDuringAJobIsRefused) {
  StartWorker("exclusive");
  ASSERT_OK(Unload("a-model"));
  may_quantize_ = false;
  ASSERT_OK(Create(TinyJob("b")));
  ASSERT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::RUNNING); }));
  const absl::Status refused = Load("a-model").status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("quantizationJobs/b")));
  EXPECT_EQ(ErrorReason(refused), "JOB_RUNNING");
  EXPECT_EQ(StateOf("a-model"), Model::UNLOADED);
  may_quantize_ = true;
  EXPECT_TRUE(WaitUntil([&] { return IsInState("b", QuantizationJob::SUCCEEDED); }));
  EXPECT_TRUE(WaitUntil([&] { return Load("a-model").ok(); }));
}

}  // namespace
}  // namespace walsh
