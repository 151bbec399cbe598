// A whole worker's job path against a fake coordinator: agent, runner and store are real, only the
// quantization itself is a script.
#include "worker/service/job_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "tests/testing/fake_coordinator.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "tests/unit/worker/service/watched_store.h"
#include "worker/kernels/device_failure.h"
#include "worker/service/agent.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using pipeline::JobProgress;
using pipeline::JobReport;
using pipeline::JobSpec;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using walsh::testing::FakeCoordinator;
using Record = FakeCoordinator::Record;
using Complete = internal::v1::CompleteJobRequest;

v1::QuantizationJob Job(const std::string& id, const std::string& model) {
  v1::QuantizationJob job;
  job.set_name(JobName(id));
  job.set_model_name(model);
  job.set_source_model("source");
  return job;
}

class JobRunnerTest : public StoreFixture {
 protected:
  void SetUp() override { OpenStore(); }

  void StartWorker() {
    runner_ = std::make_unique<JobRunner>(
        JobRunner::Options{
            .worker_id = "w-1",
            .results_directory = dir_ / "results",
            .rejected = &rejected_,
            .n_threads = 1,
            .resolve = [](std::string_view path) { return "/roots/" + std::string(path); },
            .sources = sources_.get(),
            .device = "cuda:0 NVIDIA H200",
            .checkpoints_directory = dir_ / "checkpoints",
            .kernel_family = "fake",
            .report_lag_max = report_lag_max_,
            .plan = [this](const JobSpec&) { return plan_; },
            .memory = [this] { return memory_; },
            .quantize =
                [this](const JobSpec& spec, ThreadPool&, const pipeline::Observer& observer) {
                  ++n_runs_;
                  return quantize_(spec, observer);
                },
            .on_device_broken =
                [this](const absl::Status& cause) {
                  broken_ = cause;
                  agent_->Drain();
                },
            .exclusive = exclusive_},
        &link_, store_.get(), Clock::Real());
    agent_ = std::make_unique<Agent>(
        Agent::Identity{.worker_id = "w-1", .address = "127.0.0.1:7", .device = "cpu"}, &link_,
        Agent::Hooks{.load = [this] { return Agent::Load{.models = store_->List().models}; },
                     .run_job = [this](const internal::v1::Lease& lease,
                                       HeldLease& held) { runner_->Run(lease, held); },
                     .exclusive = exclusive_},
        Clock::Real());
    agent_->Start();
  }

  void TearDown() override { agent_.reset(); }

  // Before the worker starts: jobs and models take turns.
  void BeExclusive() {
    exclusive_ = &use_;
    OpenStore();
  }

  // Before the worker starts.
  void UseArtifacts(std::unique_ptr<objects::ObjectStore> objects) {
    artifacts_ = std::make_unique<ArtifactStore>(std::move(objects));
    OpenStore();
  }

  // Before the worker starts: s3://bucket is a folder with a model and a text.
  void UseSources() {
    ASSERT_OK(MakeDirectories(dir_ / "bucket"));
    ASSERT_OK(PublishFile(dir_ / "bucket/a.gguf", "a model"));
    ASSERT_OK(PublishFile(dir_ / "bucket/a.txt", "a text"));
    absl::StatusOr<std::unique_ptr<ModelSources>> sources = ModelSources::Open(
        {.prefixes = {"s3://bucket"},
         .cache_directory = dir_ / "sources",
         .cache_bytes_max = 1000,
         .open_bucket =
             [this](const std::string&) -> absl::StatusOr<std::unique_ptr<objects::ObjectStore>> {
           return std::make_unique<WatchedStore>(
               objects::OpenDirectoryStore(dir_ / "bucket").value(), &on_read_);
         }});
    ASSERT_OK(sources);
    sources_ = *std::move(sources);
  }
  static v1::QuantizationJob JobOfSources() {
    v1::QuantizationJob job = Job("j", "m");
    job.set_source_model("s3://bucket/a.gguf");
    job.mutable_config()->mutable_calibration()->set_uri("s3://bucket/a.txt");
    return job;
  }

  // Waits for the n-th outcome.
  Complete AwaitOutcome(size_t n = 1) {
    EXPECT_TRUE(coordinator_.WaitFor([n](const Record& r) { return r.completions.size() >= n; }));
    const Record record = coordinator_.record();
    return record.completions.size() >= n ? record.completions[n - 1] : Complete();
  }

  int64_t NumTemporaries() const {
    int64_t n = 0;
    for (const auto& entry : fs::directory_iterator(root_)) {
      n += entry.path().filename().string().starts_with(".tmp-") ? 1 : 0;
    }
    return n;
  }

  // Two layers, then an artifact.
  static absl::StatusOr<JobReport> QuantizeTwoLayers(const JobSpec& spec,
                                                     const pipeline::Observer& observer) {
    for (int64_t layer = 0; layer < 2; ++layer) {
      JobProgress progress{.stage = pipeline::Stage::kQuantizing,
                           .layer = layer,
                           .layers_done = layer,
                           .layers_total = 2,
                           .fraction = 0.5 * static_cast<double>(layer)};
      progress.linears.push_back({.name = "layers." + std::to_string(layer) + ".mlp.up_proj",
                                  .layer = layer,
                                  .bits = 4,
                                  .relative_error = 0.01});
      if (absl::Status status = observer(progress); !status.ok()) return status;
    }
    WriteFakeArtifact(spec.output_directory);
    JobReport report;
    report.artifact.size_bytes = 1000;
    report.artifact.sha256 = "abc";
    report.perplexity_after = 12.5;
    return report;
  }

  // A job of seven layers with a linear each, which ends once `all_are_made` is told that all have
  // been reported, the first of them to the coordinator.
  void QuantizeSevenLayers(absl::Notification& all_are_made) {
    quantize_ = [&](const JobSpec& spec,
                    const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
      for (int64_t layer = 0; layer < 7; ++layer) {
        JobProgress progress{.stage = pipeline::Stage::kQuantizing, .layer = layer};
        progress.linears.push_back({.name = "layers." + std::to_string(layer), .layer = layer});
        if (absl::Status status = observer(progress); !status.ok()) return status;
        if (layer == 0) {
          // The first one has left the queue.
          EXPECT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() == 1; }));
        }
      }
      all_are_made.Notify();
      return QuantizeTwoLayers(spec, [](const JobProgress&) { return absl::OkStatus(); });
    };
  }

  // Of all reports on record: their layers, and the linears that they carried.
  std::pair<std::vector<int>, std::vector<std::string>> ReportedLayers() {
    std::vector<std::string> linears;
    std::vector<int> layers;
    for (const auto& report : coordinator_.record().reports) {
      layers.push_back(report.event().layer());
      for (const auto& linear : report.event().linears()) linears.push_back(linear.name());
    }
    return {layers, linears};
  }

  FakeCoordinator coordinator_{
      {.heartbeat_interval = absl::Milliseconds(10), .lease_duration = absl::Seconds(30)}};
  std::function<absl::StatusOr<JobReport>(const JobSpec&, const pipeline::Observer&)> quantize_ =
      QuantizeTwoLayers;
  ExclusiveUse use_;
  RejectedArtifacts rejected_{dir_ / "rejected"};
  absl::Duration report_lag_max_ = absl::Seconds(30);
  std::atomic<int> n_runs_ = 0;
  absl::StatusOr<pipeline::JobPlan> plan_ = pipeline::JobPlan();
  absl::StatusOr<WorkerMemory> memory_ = WorkerMemory();
  absl::Status broken_;  // read after the outcome
  WatchedStore::OnRead on_read_;
  std::unique_ptr<ModelSources> sources_;
  CoordinatorLink link_{coordinator_.address()};
  std::unique_ptr<JobRunner> runner_;
  std::unique_ptr<Agent> agent_;
};

TEST_F(JobRunnerTest, JobIsReportedPublishedAndCompleted) {
  StartWorker();
  const int64_t token = coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  EXPECT_EQ(outcome.job_name(), "quantizationJobs/j");
  EXPECT_EQ(outcome.fencing_token(), token);
  ASSERT_TRUE(outcome.has_result());
  EXPECT_EQ(outcome.result().artifact_uri(), "models/m");
  EXPECT_EQ(outcome.result().perplexity_after(), 12.5);
  EXPECT_EQ(outcome.result().device(), "cuda:0 NVIDIA H200");
  ASSERT_EQ(outcome.result().stage_times_size(), 1) << "the script has none of its own";
  EXPECT_EQ(outcome.result().stage_times(0).stage(), v1::QuantizationJob::PUBLISHING);
  EXPECT_GT(outcome.result().stage_times(0).seconds(), 0);
  EXPECT_EQ(outcome.model().name(), "models/m");
  EXPECT_EQ(outcome.model().quantization_job(), "quantizationJobs/j");
  EXPECT_EQ(outcome.model().state(), v1::Model::UNLOADED);

  const Record record = coordinator_.record();
  ASSERT_EQ(record.reports.size(), 3u);
  EXPECT_EQ(record.reports[0].event().stage(), v1::QuantizationJob::QUANTIZING);
  EXPECT_EQ(record.reports[1].event().layer(), 1);
  EXPECT_EQ(record.reports[1].event().linears(0).name(), "layers.1.mlp.up_proj");
  EXPECT_EQ(record.reports[2].event().stage(), v1::QuantizationJob::PUBLISHING);
  for (const auto& report : record.reports) EXPECT_EQ(report.fencing_token(), token);
  EXPECT_TRUE(fs::exists(root_ + "/m/walsh.json"));
  EXPECT_EQ(NumTemporaries(), 0);
}

TEST_F(JobRunnerTest, SourcesInABucketAreFetchedFirst) {
  UseSources();
  std::string model, text;
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    model = *ReadFile(spec.source_path, 100);
    text = *ReadFile(spec.calibration_path, 100);
    EXPECT_EQ(spec.calibration_name, "s3://bucket/a.txt");
    return QuantizeTwoLayers(spec, observer);
  };
  StartWorker();
  coordinator_.Offer(JobOfSources());
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_result()) << outcome.error().message();
  EXPECT_EQ(model, "a model");
  EXPECT_EQ(text, "a text");
  EXPECT_EQ(outcome.result().stage_times(0).stage(), v1::QuantizationJob::FETCHING);
  const auto first = coordinator_.record().reports[0].event();
  EXPECT_EQ(first.stage(), v1::QuantizationJob::FETCHING);
  EXPECT_THAT(first.message(), HasSubstr("MiB fetched"));
}

TEST_F(JobRunnerTest, AFetchEndsWithItsJob) {
  UseSources();
  absl::Notification is_reading;
  on_read_ = [&](const std::string& key, size_t, const KeepGoing& keep_going) {
    if (!key.ends_with(".gguf")) return absl::OkStatus();
    if (!is_reading.HasBeenNotified()) is_reading.Notify();
    absl::Status stop;
    EXPECT_TRUE(testing::WaitUntil([&] { return !(stop = Ask(keep_going)).ok(); }));
    return stop;
  };
  StartWorker();
  coordinator_.Offer(JobOfSources());
  is_reading.WaitForNotification();
  coordinator_.CancelJob();
  const Complete outcome = AwaitOutcome();
  EXPECT_TRUE(outcome.has_cancelled()) << outcome.error().message();
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(JobRunnerTest, ASourceThatIsAwayIsTriedAgainLater) {
  UseSources();
  on_read_ = [](const std::string&, size_t, const KeepGoing&) {
    return absl::AbortedError("another version");  // not the lease
  };
  StartWorker();
  coordinator_.Offer(JobOfSources());
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_FALSE(outcome.refused());
}

TEST_F(JobRunnerTest, WhatFailsItsQualityGateIsKeptApart) {
  double perplexity_after = 12.5;
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    absl::StatusOr<JobReport> report = QuantizeTwoLayers(spec, observer);
    report->evaluation_tokens = 100;
    report->perplexity_before = 10;
    report->perplexity_after = perplexity_after;
    report->kl_divergence = 0.25;
    return report;
  };
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_quality_gate()->set_max_perplexity_ratio(1.2);
  job.mutable_config()->mutable_auto_load();
  StartWorker();
  coordinator_.Offer(job);
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error_reason(), "QUALITY_GATE");
  EXPECT_FALSE(outcome.refused());
  EXPECT_THAT(FromProtoStatus(outcome.error()),
              testing::StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("1.25 times")));
  ASSERT_TRUE(outcome.has_rejected_result());
  EXPECT_EQ(outcome.rejected_result().perplexity_after(), 12.5);
  EXPECT_EQ(outcome.rejected_result().kl_divergence(), 0.25);
  EXPECT_EQ(outcome.rejected_result().device(), "cuda:0 NVIDIA H200");
  EXPECT_EQ(outcome.rejected_result().artifact_uri(), "");
  EXPECT_THAT(outcome.rejected_result().warnings(),
              ::testing::Contains(HasSubstr("judged the model on 100 tokens")));
  EXPECT_TRUE(store_->List().models.empty());
  EXPECT_TRUE(fs::exists(rejected_.Directory("j") + "/walsh.json"));
  EXPECT_EQ(NumTemporaries(), 0);
  for (const auto& report : coordinator_.record().reports) {
    EXPECT_NE(report.event().stage(), v1::QuantizationJob::PUBLISHING);
  }

  perplexity_after = 12;
  job.set_name(JobName("k"));
  coordinator_.Offer(job);
  const Complete passed = AwaitOutcome(2);
  EXPECT_TRUE(passed.has_result()) << passed.error().message();
  EXPECT_FALSE(passed.has_rejected_result());
  EXPECT_FALSE(fs::exists(rejected_.Directory("k")));
}

// What is acknowledged outlives the machine.
TEST_F(JobRunnerTest, AModelIsInTheArtifactStoreBeforeItsJobIsCompleted) {
  UseArtifacts(objects::OpenDirectoryStore(dir_ / "store").value());
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(AwaitOutcome().has_result());
  ASSERT_OK_AND_ASSIGN(const ArtifactStore::Origin origin, artifacts_->Find("m"));
  EXPECT_EQ(origin.job_name, JobName("j"));
  EXPECT_GT(origin.fencing_token, 0);
}

TEST_F(JobRunnerTest, WithoutItsArtifactStoreAJobIsNotCompleted) {
  UseArtifacts(StoreThatIsAway());
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  EXPECT_EQ(FromProtoStatus(outcome.error()).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(outcome.refused());
}

// Of a worker that died between the two.
TEST_F(JobRunnerTest, WhatAnotherWorkerHasKeptIsCompletedAndNotMadeAgain) {
  UseArtifacts(objects::OpenDirectoryStore(dir_ / "store").value());
  WriteFakeArtifact(dir_ / "elsewhere");
  ASSERT_OK(artifacts_->Keep("m", dir_ / "elsewhere", {.job_name = JobName("j")}, {}));
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  EXPECT_OK(store_->Get("m"));

  // Another job's is in the way of this one's, which is told before the work.
  ASSERT_OK(artifacts_->Keep("n", dir_ / "elsewhere", {.job_name = JobName("x")}, {}));
  coordinator_.Offer(Job("k", "n"));
  const Complete outcome = AwaitOutcome(2);
  EXPECT_EQ(FromProtoStatus(outcome.error()).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(n_runs_, 0);
}

// A job that was cancelled, or that another worker has, while its last layer was evaluated.
TEST_F(JobRunnerTest, WhatIsNoLongerItsJobIsNotKeptApart) {
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    absl::StatusOr<JobReport> report = QuantizeTwoLayers(spec, observer);
    report->evaluation_tokens = 5000;
    report->perplexity_before = 10;
    report->perplexity_after = 1000;
    coordinator_.CancelJob();
    EXPECT_TRUE(testing::WaitUntil(
        [&] { return !observer({.stage = pipeline::Stage::kEvaluating, .layer = -1}).ok(); }));
    return report;
  };
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_quality_gate()->set_max_perplexity_ratio(1.2);
  StartWorker();
  coordinator_.Offer(job);
  EXPECT_TRUE(AwaitOutcome().has_cancelled());
  EXPECT_FALSE(fs::exists(rejected_.Directory("j")));
  EXPECT_EQ(NumTemporaries(), 0);
}

TEST_F(JobRunnerTest, SpecificationCarriesTheJobsOptions) {
  v1::QuantizationJob job = Job("j", "m");
  v1::QuantizationConfig& config = *job.mutable_config();
  config.set_method(v1::QuantizationConfig::GPTAQ);
  config.set_gptaq_alpha(0.75);
  config.set_column_order(v1::QuantizationConfig::ACT_ORDER);
  config.set_bits(2);
  config.set_grid(v1::QuantizationConfig::CODEBOOK);
  config.set_zero_point(v1::QuantizationConfig::FLOAT_ZERO);
  for (const auto& [pattern, bits] : {std::pair("*", 4), std::pair("layers.0.*", 8)}) {
    config.add_overrides()->set_pattern(pattern);
    config.mutable_overrides(config.overrides_size() - 1)->set_bits(bits);
  }
  config.set_group_size(-1);
  config.set_symmetric(true);
  config.set_seed(7);
  config.set_disable_mse_clip(true);
  config.set_error_propagation(0.25);
  config.mutable_rotation()->set_kind(v1::Rotation::LOCAL_HADAMARD);
  config.mutable_rotation()->set_signs(v1::Rotation::SEEDED);
  config.mutable_calibration()->set_uri("text.jsonl");
  config.mutable_calibration()->set_num_samples(4);
  config.mutable_evaluation()->set_disable(true);
  config.mutable_quality_gate();
  JobSpec seen;
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    seen = spec;
    return QuantizeTwoLayers(spec, observer);
  };
  StartWorker();
  coordinator_.Offer(job);
  AwaitOutcome();
  EXPECT_EQ(seen.job_name, "quantizationJobs/j");
  EXPECT_EQ(seen.source_path, "/roots/source");
  EXPECT_EQ(seen.quantizer.method, gptq::Method::kGptaq);
  EXPECT_EQ(seen.quantizer.gptaq_alpha, 0.75);
  EXPECT_EQ(seen.quantizer.column_order, gptq::ColumnOrder::kActOrder);
  EXPECT_EQ(seen.quantizer.bits, 2);
  EXPECT_EQ(seen.quantizer.grid, gptq::Grid::kCodebook);
  EXPECT_EQ(seen.quantizer.zero_point, gptq::ZeroPoint::kFloat);
  ASSERT_EQ(seen.overrides.size(), 2u);
  EXPECT_EQ(seen.overrides[1].pattern, "layers.0.*");
  EXPECT_EQ(seen.overrides[1].bits, 8);
  EXPECT_EQ(seen.quantizer.group_size, -1);
  EXPECT_TRUE(seen.quantizer.symmetric);
  EXPECT_FALSE(seen.quantizer.mse_clip);
  EXPECT_EQ(seen.quantizer.damp, 0.01);
  EXPECT_EQ(seen.quantizer.error_propagation, 0.25);
  EXPECT_EQ(seen.rotation, rotate::Kind::kLocalHadamard);
  EXPECT_TRUE(seen.rotation_signs);
  EXPECT_EQ(seen.calibration_path, "/roots/text.jsonl");
  EXPECT_EQ(seen.calibration_name, "text.jsonl");
  EXPECT_EQ(seen.n_calibration_windows, 4);
  EXPECT_EQ(seen.sequence_length, 2048);
  EXPECT_FALSE(seen.evaluate);
  EXPECT_EQ(seen.seed, 7u);
}

TEST_F(JobRunnerTest, BadOptionFailsTheJobWithItsField) {
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->set_bits(5);
  StartWorker();
  coordinator_.Offer(job);
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(outcome.error().message(), HasSubstr("config.bits"));
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(JobRunnerTest, FailureIsTheJobsErrorAndLeavesNothing) {
  quantize_ = [](const JobSpec& spec, const pipeline::Observer&) -> absl::StatusOr<JobReport> {
    WriteFakeArtifact(spec.output_directory);
    return absl::DataLossError("layer 3, tensor 'x', index 7 is NaN");
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kDataLoss));
  EXPECT_THAT(outcome.error().message(), HasSubstr("index 7"));
  EXPECT_FALSE(fs::exists(root_ + "/m"));
  EXPECT_EQ(NumTemporaries(), 0);
}

TEST_F(JobRunnerTest, AFailureOfTheDeviceLeavesAWorkerThatRunsTheNextJob) {
  quantize_ = [this](const JobSpec& spec,
                     const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
    if (n_runs_ > 1) return QuantizeTwoLayers(spec, observer);
    WriteFakeArtifact(spec.output_directory);
    return absl::ResourceExhaustedError("5 bytes of device memory are needed, 4 are free");
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete failure = AwaitOutcome();
  ASSERT_TRUE(failure.has_error());
  EXPECT_EQ(failure.error().code(), static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(NumTemporaries(), 0);
  // The coordinator tries it again; the name is free.
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome(2).has_result());
  EXPECT_OK(broken_);
}

TEST_F(JobRunnerTest, ABrokenDeviceIsAFailureThatIsRetriedAndTheLastJobOfTheWorker) {
  quantize_ = [](const JobSpec& spec, const pipeline::Observer&) -> absl::StatusOr<JobReport> {
    WriteFakeArtifact(spec.output_directory);
    return MarkDeviceBroken(absl::InternalError("an illegal memory access"));
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  coordinator_.Offer(Job("k", "n"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(outcome.error_reason(), "DEVICE_BROKEN");
  EXPECT_THAT(outcome.error().message(), HasSubstr("cuda:0 NVIDIA H200 is broken"));
  EXPECT_THAT(outcome.error().message(), HasSubstr("INTERNAL: an illegal memory access"));
  ASSERT_EQ(outcome.error().details_size(), 1) << "the mark of this process stays here";
  EXPECT_THAT(outcome.error().details(0).type_url(), HasSubstr("ErrorInfo"));
  EXPECT_TRUE(IsDeviceBroken(broken_));
  EXPECT_EQ(NumTemporaries(), 0);
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.heartbeats.back().draining(); }));
  const size_t n_heartbeats = coordinator_.record().heartbeats.size();
  ASSERT_TRUE(coordinator_.WaitFor(
      [&](const Record& r) { return r.heartbeats.size() > n_heartbeats + 10; }));
  EXPECT_EQ(n_runs_, 1) << "the second job is for another worker";
}

// Else a job that breaks every device would go round for ever, since a hand-back does not count.
TEST_F(JobRunnerTest, ABrokenDeviceIsAFailureAlsoWhenTheWorkerStopsForIt) {
  std::thread stopping;
  quantize_ = [&](const JobSpec&, const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
    stopping = std::thread([this] { agent_->Stop(); });
    // Until the lease is handed back.
    while (observer({.stage = pipeline::Stage::kQuantizing}).ok()) {
      walsh::testing::Pause(absl::Milliseconds(2));
    }
    return MarkDeviceBroken(absl::InternalError("an illegal memory access"));
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_EQ(AwaitOutcome().error_reason(), "DEVICE_BROKEN");
  stopping.join();
}

TEST_F(JobRunnerTest, AJobThatCannotFitIsRefusedBeforeTheWork) {
  plan_->device_memory_bytes_needed = 100;
  memory_->device = {.total_bytes = 80, .free_bytes = 70};
  memory_->device_name = "cuda:0 NVIDIA H200";
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(outcome.error_reason(), "INSUFFICIENT_MEMORY");
  EXPECT_THAT(outcome.error().message(),
              HasSubstr("needs 100 bytes of device memory, cuda:0 NVIDIA H200 has 80"));
  EXPECT_TRUE(outcome.refused()) << "another worker may have more";
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(JobRunnerTest, AModelThatTheDeviceDoesNotTakeIsRefusedBeforeTheWork) {
  plan_ = absl::UnimplementedError("head_dim 80: attention on the CUDA backend takes 16 to 128");
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(outcome.error().message(), HasSubstr("head_dim 80"));
  EXPECT_TRUE(outcome.refused());
  EXPECT_EQ(n_runs_, 0);
  // It goes on with what it can run.
  plan_ = pipeline::JobPlan();
  coordinator_.Offer(Job("k", "n"));
  EXPECT_TRUE(AwaitOutcome(2).has_result());
}

TEST_F(JobRunnerTest, WhatIsWrongWithTheJobIsNotRefusedButFailed) {
  plan_ = absl::DataLossError("tensor 'x' is cut short");
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kDataLoss));
  EXPECT_FALSE(outcome.refused());
}

// A chat template or a tokenizer that walsh does not take is found in the midst of a job. Every
// other worker would find the same, after reading the whole source.
TEST_F(JobRunnerTest, WhatIsUnimplementedInsideTheWorkIsNotRefusedButFailed) {
  quantize_ = [](const JobSpec&, const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
    EXPECT_OK(observer({.stage = pipeline::Stage::kLoading}));
    return absl::UnimplementedError("chat template: the filter 'groupby'");
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(outcome.error().message(), HasSubstr("groupby"));
  EXPECT_FALSE(outcome.refused());
}

// A lease that was granted while the worker began to stop, because of a broken device, too: the job
// was not touched, and no failure of it is counted.
TEST_F(JobRunnerTest, AWorkerThatStopsBeginsNothing) {
  memory_ = MarkDeviceBroken(absl::InternalError("fell off the bus"));
  StartWorker();
  internal::v1::Lease lease;
  lease.set_job_name(JobName("j"));
  *lease.mutable_job() = Job("j", "m");
  HeldLease held(lease.job_name(), 1, absl::Seconds(30), Clock::Real());
  held.HandBack();
  runner_->Run(lease, held);
  EXPECT_TRUE(AwaitOutcome().has_returned());
  EXPECT_OK(broken_) << "nobody looked";
  EXPECT_EQ(n_runs_, 0);
}

// Loading a large model takes longer than a worker has that must stop.
TEST_F(JobRunnerTest, AWorkerThatStopsDeliversItsModelAndDoesNotLoadIt) {
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(AwaitOutcome().has_result());
  // The same job again: its model was published, and what is left is to load and to tell.
  internal::v1::Lease lease;
  lease.set_job_name(JobName("j"));
  *lease.mutable_job() = Job("j", "m");
  lease.mutable_job()->mutable_config()->mutable_auto_load();
  HeldLease held(lease.job_name(), 2, absl::Seconds(30), Clock::Real());
  held.HandBack();
  runner_->Run(lease, held);
  const Complete outcome = AwaitOutcome(2);
  ASSERT_TRUE(outcome.has_result());
  EXPECT_EQ(outcome.model().state(), v1::Model::UNLOADED);
  EXPECT_THAT(outcome.result().warnings(),
              ::testing::Contains(HasSubstr("published but not loaded")));
}

class CheckpointedJobTest : public JobRunnerTest {
 protected:
  // A job that keeps its layers: `stop` is called while it is in the first.
  void QuantizeWith(std::function<absl::Status()> stop) {
    quantize_ = [this, stop = std::move(stop)](
                    const JobSpec& spec,
                    const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
      EXPECT_OK(spec.checkpoints->Claim());
      for (int64_t layer = 0; layer < 2; ++layer) {
        const JobProgress progress{.stage = pipeline::Stage::kQuantizing,
                                   .layer = layer,
                                   .layers_done = layer,
                                   .layers_total = 2,
                                   .keeps_layers = true};
        if (absl::Status status = observer(progress); !status.ok()) return status;
        n_layers_begun_ = layer + 1;
        if (layer > 0) continue;
        if (absl::Status status = stop(); !status.ok()) return status;
        if (absl::Status status = observer(progress); !status.ok()) return status;
        n_layers_done_ = 1;
      }
      return QuantizeTwoLayers(spec, observer);
    };
  }

  void RunHeld() {
    StartWorker();
    internal::v1::Lease lease;
    lease.set_job_name(held_.job_name());
    *lease.mutable_job() = Job("j", "m");
    runner_->Run(lease, held_);
  }

  bool HasCheckpoint() const { return fs::exists(std::string(dir_ / "checkpoints") + "/j"); }

  HeldLease held_{JobName("j"), 1, absl::Seconds(30), Clock::Real()};
  int64_t n_layers_begun_ = 0, n_layers_done_ = 0;
};

TEST_F(CheckpointedJobTest, AWorkerThatStopsFinishesItsLayer) {
  QuantizeWith([this] {
    held_.HandBack(absl::Minutes(1));
    return absl::OkStatus();
  });
  RunHeld();
  EXPECT_TRUE(AwaitOutcome().has_returned());
  EXPECT_EQ(n_layers_done_, 1);
  EXPECT_EQ(n_layers_begun_, 1) << "and begins no other";
  EXPECT_TRUE(HasCheckpoint());
}

TEST_F(CheckpointedJobTest, ALayerThatTakesTooLongIsNotWaitedFor) {
  QuantizeWith([this] {
    held_.HandBack();
    return absl::OkStatus();
  });
  RunHeld();
  EXPECT_TRUE(AwaitOutcome().has_returned());
  EXPECT_EQ(n_layers_done_, 0);
  EXPECT_TRUE(HasCheckpoint());
}

TEST_F(CheckpointedJobTest, WhatEndsTheJobRemovesItsCheckpoint) {
  QuantizeWith([] { return absl::OkStatus(); });
  RunHeld();
  EXPECT_TRUE(AwaitOutcome().has_result());
  EXPECT_FALSE(HasCheckpoint());
}

TEST_F(CheckpointedJobTest, AFailureForGoodAndACancellationDoSo) {
  QuantizeWith([] { return absl::DataLossError("not finite"); });
  RunHeld();
  EXPECT_TRUE(AwaitOutcome().has_error());
  EXPECT_FALSE(HasCheckpoint());

  QuantizeWith([this] {
    held_.Cancel();
    return absl::OkStatus();
  });
  internal::v1::Lease lease;
  lease.set_job_name(held_.job_name());
  *lease.mutable_job() = Job("j", "m");
  runner_->Run(lease, held_);
  EXPECT_TRUE(AwaitOutcome(2).has_cancelled());
  EXPECT_FALSE(HasCheckpoint());
}

TEST_F(CheckpointedJobTest, AFailureThatMayPassKeepsIt) {
  QuantizeWith([] { return absl::UnavailableError("for now"); });
  RunHeld();
  EXPECT_TRUE(AwaitOutcome().has_error());
  EXPECT_TRUE(HasCheckpoint());
}

// It slept, and another worker has claimed the checkpoint: nothing is said and nothing removed.
TEST_F(CheckpointedJobTest, AJobThatIsAnothersIsLeftToIt) {
  QuantizeWith([] { return absl::AbortedError("the checkpoint belongs to token 2"); });
  RunHeld();
  EXPECT_TRUE(held_.is_lost());
  EXPECT_TRUE(coordinator_.record().completions.empty());
  EXPECT_TRUE(HasCheckpoint());
}

TEST_F(JobRunnerTest, ADeviceThatBrokeWhileIdleIsNoticedBeforeTheWork) {
  memory_ = MarkDeviceBroken(absl::InternalError("fell off the bus"));
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_EQ(AwaitOutcome().error_reason(), "DEVICE_BROKEN");
  EXPECT_TRUE(IsDeviceBroken(broken_));
  EXPECT_EQ(n_runs_, 0);
}

// Works until its observer says otherwise.
absl::StatusOr<JobReport> QuantizeForEver(const JobSpec& spec, const pipeline::Observer& observer) {
  WriteFakeArtifact(spec.output_directory);
  for (int64_t layer = 0;; ++layer) {
    const absl::Status status =
        observer({.stage = pipeline::Stage::kQuantizing, .layer = layer, .layers_done = layer});
    if (!status.ok()) return status;
    walsh::testing::Pause(absl::Milliseconds(2));
  }
}

TEST_F(JobRunnerTest, CancelledJobSaysSo) {
  quantize_ = QuantizeForEver;
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() >= 2; }));
  coordinator_.CancelJob();
  EXPECT_TRUE(AwaitOutcome().has_cancelled());
  EXPECT_FALSE(fs::exists(root_ + "/m"));
  EXPECT_EQ(NumTemporaries(), 0);
}

TEST_F(JobRunnerTest, CancellationThatComesWithTheLastReportIsObeyed) {
  coordinator_.set_on_report([](const internal::v1::ReportProgressRequest& request) {
    return request.event().stage() == v1::QuantizationJob::PUBLISHING
               ? absl::FailedPreconditionError("the job is CANCELLING")
               : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_cancelled());
  EXPECT_FALSE(fs::exists(root_ + "/m"));
}

TEST_F(JobRunnerTest, LostLeaseStopsTheJobWithoutAWord) {
  quantize_ = QuantizeForEver;
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() >= 2; }));
  coordinator_.LoseLease();
  ASSERT_TRUE(
      coordinator_.WaitFor([](const Record& r) { return r.heartbeats.back().job_name().empty(); }));
  // The lease is forgotten first; the job's thread is on its way out.
  EXPECT_TRUE(testing::WaitUntil([this] { return NumTemporaries() == 0; }));
  EXPECT_TRUE(coordinator_.record().completions.empty());
  EXPECT_FALSE(fs::exists(root_ + "/m"));
}

TEST_F(JobRunnerTest, StaleTokenPublishesNothing) {
  coordinator_.set_on_report([](const internal::v1::ReportProgressRequest& request) {
    return request.event().stage() == v1::QuantizationJob::PUBLISHING
               ? absl::AbortedError("token 2 is current")
               : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() >= 3; }));
  const size_t n_heartbeats = coordinator_.record().heartbeats.size();
  ASSERT_TRUE(coordinator_.WaitFor(
      [&](const Record& r) { return r.heartbeats.size() > n_heartbeats + 3; }));
  agent_.reset();  // whatever it was about to do is done
  EXPECT_TRUE(coordinator_.record().completions.empty());
  EXPECT_FALSE(fs::exists(root_ + "/m"));
}

TEST_F(JobRunnerTest, JobGoesOnWhileTheCoordinatorIsAway) {
  std::atomic<int> n_refused = 0;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest& request) {
    if (request.event().layer() == 0) {
      ++n_refused;
      return absl::UnavailableError("restarting");
    }
    return absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  EXPECT_EQ(n_refused, 1);
  // What the refused report carried comes with the next one.
  EXPECT_EQ(coordinator_.record().reports[1].event().linears_size(), 2);
}

// Reports of six layers while the first one is on its way: each of them is told.
TEST_F(JobRunnerTest, TheJobDoesNotWaitForItsReportsAndNoLayerIsLeftOut) {
  absl::Notification all_are_made;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest& request) {
    if (request.event().layer() == 0) {
      EXPECT_TRUE(all_are_made.WaitForNotificationWithTimeout(absl::Seconds(4)));
    }
    return absl::OkStatus();
  });
  QuantizeSevenLayers(all_are_made);
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  const auto [layers, linears] = ReportedLayers();
  EXPECT_THAT(layers, ElementsAre(0, 1, 2, 3, 4, 5, 6, -1));
  EXPECT_EQ(linears.size(), 7u);
  EXPECT_TRUE(std::is_sorted(linears.begin(), linears.end()));
}

// The first report is refused while six wait behind it, which become one.
TEST_F(JobRunnerTest, ReportsBehindOneThatIsNotTakenBecomeOne) {
  absl::Notification all_are_made;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest& request) {
    if (request.event().layer() != 0) return absl::OkStatus();
    EXPECT_TRUE(all_are_made.WaitForNotificationWithTimeout(absl::Seconds(4)));
    return absl::UnavailableError("restarting");
  });
  QuantizeSevenLayers(all_are_made);
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  const auto [layers, linears] = ReportedLayers();
  EXPECT_THAT(layers, ElementsAre(0, 6, -1));
  // The refused report is on record as well, and what it carried came again.
  EXPECT_EQ(linears.size(), 8u);
  EXPECT_EQ(linears[0], linears[1]);
}

// The first report takes its time while six wait behind it, for longer than any may.
TEST_F(JobRunnerTest, ReportsThatHaveWaitedTooLongBecomeOne) {
  report_lag_max_ = absl::ZeroDuration();
  absl::Notification all_are_made;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest& request) {
    if (request.event().layer() == 0) {
      EXPECT_TRUE(all_are_made.WaitForNotificationWithTimeout(absl::Seconds(4)));
    }
    return absl::OkStatus();
  });
  QuantizeSevenLayers(all_are_made);
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  const auto [layers, linears] = ReportedLayers();
  EXPECT_THAT(layers, ElementsAre(0, 6, -1));
  EXPECT_EQ(linears.size(), 7u);
}

// Each report that a hanging coordinator does not take costs the timeout of a call.
TEST_F(JobRunnerTest, AJobThatMustStopDoesNotWaitForTheReportsBehindTheOneOnItsWay) {
  absl::Notification is_stopped;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest&) {
    EXPECT_TRUE(is_stopped.WaitForNotificationWithTimeout(absl::Seconds(4)));
    return absl::OkStatus();
  });
  quantize_ = [&](const JobSpec&, const pipeline::Observer& observer) -> absl::StatusOr<JobReport> {
    for (int64_t layer = 0; layer < 4; ++layer) {
      EXPECT_OK(observer({.stage = pipeline::Stage::kQuantizing, .layer = layer}));
    }
    EXPECT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() == 1; }));
    coordinator_.CancelJob();
    absl::Status stop;
    EXPECT_TRUE(testing::WaitUntil([&] {
      stop = observer({.stage = pipeline::Stage::kQuantizing, .layer = 3});
      return !stop.ok();
    }));
    is_stopped.Notify();
    return stop;
  };
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_cancelled());
  EXPECT_EQ(coordinator_.record().reports.size(), 1u);
}

TEST_F(JobRunnerTest, PublishingWaitsForTheCoordinator) {
  std::atomic<int> n_tries = 0;
  coordinator_.set_on_report([&](const internal::v1::ReportProgressRequest& request) {
    if (request.event().stage() != v1::QuantizationJob::PUBLISHING) return absl::OkStatus();
    return ++n_tries < 3 ? absl::UnavailableError("restarting") : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome().has_result());
  EXPECT_EQ(n_tries, 3);
}

TEST_F(JobRunnerTest, OutcomeIsRepeatedUntilItIsTaken) {
  std::atomic<int> n_tries = 0;
  coordinator_.set_on_complete([&](const Complete&) {
    return ++n_tries < 3 ? absl::UnavailableError("restarting") : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome(3).has_result());
  EXPECT_EQ(n_runs_, 1);
}

// The job is over then, and the next heartbeat finds no lease of it.
TEST_F(JobRunnerTest, OutcomeWhoseAnswerWasLostIsSentOnceMoreWithoutALease) {
  std::atomic<int> n_tries = 0;
  coordinator_.set_on_complete([&](const Complete&) {
    if (++n_tries > 1) return absl::OkStatus();
    coordinator_.LoseLease();
    const size_t n_before = coordinator_.record().heartbeats.size();
    EXPECT_TRUE(
        coordinator_.WaitFor([&](const Record& r) { return r.heartbeats.size() >= n_before + 3; }));
    return absl::UnavailableError("the answer was lost");
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  EXPECT_TRUE(AwaitOutcome(2).has_result());
  EXPECT_EQ(n_runs_, 1);
}

TEST_F(JobRunnerTest, ResultThatIsRefusedForGoodEndsTheJobWithAnError) {
  coordinator_.set_on_complete([](const Complete& request) {
    return request.has_result() ? absl::InternalError("the store is damaged") : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome(2);
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kInternal));
  EXPECT_THAT(outcome.error().message(), HasSubstr("the store is damaged"));
  EXPECT_EQ(outcome.error_reason(), "OUTCOME_REFUSED");
}

TEST_F(JobRunnerTest, ErrorThatIsRefusedForGoodIsNotRepeated) {
  quantize_ = [](const JobSpec&, const pipeline::Observer&) -> absl::StatusOr<JobReport> {
    return absl::DataLossError("NaN");
  };
  coordinator_.set_on_complete([](const Complete&) { return absl::UnimplementedError("what?"); });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  AwaitOutcome();
  coordinator_.set_on_complete({});
  coordinator_.Offer(Job("k", "n"));
  EXPECT_EQ(AwaitOutcome(2).job_name(), "quantizationJobs/k");
}

TEST_F(JobRunnerTest, PublishingThatIsRefusedForGoodEndsTheJob) {
  coordinator_.set_on_report([](const internal::v1::ReportProgressRequest& request) {
    return request.event().stage() == v1::QuantizationJob::PUBLISHING
               ? absl::DataLossError("the store is damaged")
               : absl::OkStatus();
  });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_THAT(outcome.error().message(), HasSubstr("the store is damaged"));
  EXPECT_FALSE(fs::exists(root_ + "/m"));
}

TEST_F(JobRunnerTest, PublishedBeforeACrashIsCompletedWithItsReport) {
  // The outcome is never taken, as if the worker died on the way.
  coordinator_.set_on_complete([](const Complete&) { return absl::AbortedError("gone"); });
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  AwaitOutcome();
  agent_.reset();
  OpenStore();  // the next process on this data folder
  coordinator_.set_on_complete({});
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome(2);
  ASSERT_TRUE(outcome.has_result());
  EXPECT_EQ(outcome.result().perplexity_after(), 12.5);
  EXPECT_EQ(outcome.fencing_token(), 2);
  EXPECT_EQ(n_runs_, 1);
}

TEST_F(JobRunnerTest, NameTakenByAnotherJobFails) {
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  AwaitOutcome();
  coordinator_.Offer(Job("k", "m"));
  const Complete outcome = AwaitOutcome(2);
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kAlreadyExists));
  EXPECT_EQ(outcome.error_reason(), "MODEL_EXISTS");
  EXPECT_EQ(n_runs_, 1);
}

TEST_F(JobRunnerTest, NameTakenByADamagedArtifactFailsBeforeTheWork) {
  AddArtifact("m");
  ASSERT_OK(PublishFile(root_ + "/m/walsh.json", "{"));
  OpenStore();
  ASSERT_FALSE(store_->Get("m").ok()) << "it is not listed";
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_error());
  EXPECT_EQ(outcome.error().code(), static_cast<int>(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(outcome.error().message(), HasSubstr("cannot be read"));
  EXPECT_EQ(outcome.error_reason(), "MODEL_EXISTS");
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(JobRunnerTest, StoppingWorkerHandsTheJobBack) {
  quantize_ = QuantizeForEver;
  StartWorker();
  coordinator_.Offer(Job("j", "m"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.reports.size() >= 2; }));
  agent_->Stop();
  EXPECT_TRUE(AwaitOutcome().has_returned());
  EXPECT_EQ(coordinator_.record().goodbyes.size(), 1u);
}

TEST_F(JobRunnerTest, AutoLoadServesBeforeItCompletes) {
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_auto_load();
  StartWorker();
  coordinator_.Offer(job);
  EXPECT_EQ(AwaitOutcome().model().state(), v1::Model::READY);
  EXPECT_OK(store_->FindEngine("m"));
}

// A job's own model comes after its work, and before the next job.
TEST_F(JobRunnerTest, AnExclusiveWorkerLoadsAfterTheJobAndRunsNoneBesideTheModel) {
  AddArtifact("other");
  BeExclusive();
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    const absl::Status refused = store_->Load("other").status();
    EXPECT_THAT(refused, testing::StatusIs(absl::StatusCode::kUnavailable,
                                           HasSubstr(spec.job_name + " runs on this worker")));
    EXPECT_EQ(ErrorReason(refused), "JOB_RUNNING");
    return QuantizeTwoLayers(spec, observer);
  };
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_auto_load();
  StartWorker();
  coordinator_.Offer(job);
  const Complete outcome = AwaitOutcome();
  EXPECT_TRUE(outcome.has_result()) << outcome.ShortDebugString();
  EXPECT_EQ(outcome.model().state(), v1::Model::READY);
  EXPECT_OK(store_->Load("other")) << "beside the other model";
  coordinator_.Offer(Job("k", "n"));
  ASSERT_OK(store_->Unload("m"));
  const size_t n_heartbeats = coordinator_.record().heartbeats.size();
  ASSERT_TRUE(coordinator_.WaitFor(
      [&](const Record& r) { return r.heartbeats.size() > n_heartbeats + 10; }));
  EXPECT_EQ(n_runs_, 1);
  ASSERT_OK(store_->Unload("other"));
  EXPECT_TRUE(AwaitOutcome(2).has_result());
  EXPECT_EQ(n_runs_, 2);
}

// Engines start their threads where the model is loaded, and threads inherit their niceness.
TEST_F(JobRunnerTest, TheJobIsNiceAndTheModelThatItLoadsIsNot) {
  std::atomic<int> nice_of_job = -1;
  std::atomic<int> nice_of_load = -1;
  quantize_ = [&](const JobSpec& spec, const pipeline::Observer& observer) {
    nice_of_job = getpriority(PRIO_PROCESS, 0);
    return QuantizeTwoLayers(spec, observer);
  };
  loader_ = [&](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    nice_of_load = getpriority(PRIO_PROCESS, 0);
    return testing::FakeModel::Create(behaviour_);
  };
  OpenStore();
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_auto_load();
  StartWorker();
  coordinator_.Offer(job);
  EXPECT_EQ(AwaitOutcome().model().state(), v1::Model::READY);
  const int nice_of_test = getpriority(PRIO_PROCESS, 0);
  EXPECT_EQ(nice_of_load, nice_of_test);
  EXPECT_EQ(nice_of_job, std::max(nice_of_test, 10));
}

TEST_F(JobRunnerTest, AutoLoadThatFailsIsAWarning) {
  loader_ = [](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    return absl::ResourceExhaustedError("no memory");
  };
  OpenStore();
  v1::QuantizationJob job = Job("j", "m");
  job.mutable_config()->mutable_auto_load();
  StartWorker();
  coordinator_.Offer(job);
  const Complete outcome = AwaitOutcome();
  ASSERT_TRUE(outcome.has_result());
  ASSERT_EQ(outcome.result().warnings_size(), 1);
  EXPECT_THAT(outcome.result().warnings(0), HasSubstr("no memory"));
}

TEST(RemoveStaleResultsTest, OldOnesGo) {
  const testing::TempDir dir;
  ASSERT_OK(RemoveStaleResults(dir / "none", absl::Hours(1)));
  const std::string result = dir / "job-1.result";
  ASSERT_OK(PublishFile(result, "r"));
  ASSERT_OK(RemoveStaleResults(dir.path(), absl::Hours(1)));
  EXPECT_TRUE(fs::exists(result));
  ASSERT_OK(RemoveStaleResults(dir.path(), -absl::Hours(1)));
  EXPECT_FALSE(fs::exists(result));
}

}  // namespace
}  // namespace walsh::service
