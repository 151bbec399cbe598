// The service over loopback, with a scripted evaluation behind it.
#include "worker/service/evaluation_service.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/synchronization/notification.h"
#include "common/clock.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "worker/service/memory_check.h"

namespace walsh::service {
namespace {

using evaluate::EvaluationReport;
using evaluate::EvaluationSpec;
using evaluate::StepProgress;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;
using Response = v1::EvaluateModelResponse;

class EvaluationServiceTest : public StoreFixture {
 protected:
  void SetUp() override {
    AddArtifact("m");
    OpenStore();
    service_ = std::make_unique<EvaluationService>(
        EvaluationService::Options{
            .resolve = [](std::string_view path) -> absl::StatusOr<std::string> {
              if (path == "/elsewhere") return absl::InvalidArgumentError("is beneath no root");
              return "/roots" + std::string(path);
            },
            .n_threads = 1,
            .memory = [] { return HostMemory{.total_bytes = 1000, .free_bytes = 10}; },
            .evaluate = [this](const EvaluationSpec& spec, ThreadPool&,
                               const StepProgress& progress) { return evaluate_(spec, progress); }},
        store_.get(), &manual_clock_);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    stub_ = v1::EvaluationService::NewStub(MakeChannel("127.0.0.1:" + std::to_string(port)));
    request_.set_model("models/m");
    request_.mutable_text()->set_uri("/text.txt");
  }
  void TearDown() override { server_->Shutdown(std::chrono::system_clock::now()); }

  absl::StatusOr<Response::Result> Call(grpc::ClientContext& context) {
    const auto reader = stub_->EvaluateModel(&context, request_);
    Response response;
    Response::Result result;
    while (reader->Read(&response)) {
      if (response.has_progress()) steps_.push_back(response.progress().step());
      if (response.has_result()) result = response.result();
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return result;
  }
  absl::StatusOr<Response::Result> Call() {
    grpc::ClientContext context;
    return Call(context);
  }

  // Goes on until it is told to stop.
  absl::StatusOr<EvaluationReport> Endless(const StepProgress& progress) {
    is_running_ = true;
    while (true) {
      if (absl::Status status = progress("text", 0.5); !status.ok()) {
        is_running_ = false;
        return status;
      }
      std::this_thread::yield();
    }
  }

  std::function<absl::StatusOr<EvaluationReport>(const EvaluationSpec&, const StepProgress&)>
      evaluate_ = [](const EvaluationSpec&, const StepProgress&) { return EvaluationReport(); };
  v1::EvaluateModelRequest request_;
  std::vector<std::string> steps_;
  std::atomic<bool> is_running_ = false;
  std::unique_ptr<EvaluationService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::EvaluationService::Stub> stub_;
};

TEST_F(EvaluationServiceTest, CarriesTheRequestThereAndTheReportBack) {
  EvaluationSpec seen;
  evaluate_ = [&](const EvaluationSpec& spec,
                  const StepProgress& progress) -> absl::StatusOr<EvaluationReport> {
    seen = spec;
    for (const char* step : {"files", "text", "piqa"}) {
      if (absl::Status status = progress(step, 0.25); !status.ok()) return status;
    }
    EvaluationReport report;
    report.text = {.loss = 2,
                   .perplexity = {.mean = 7.4, .standard_error = 0.5},
                   .windows = 3,
                   .tokens = 300,
                   .reference_format = "safetensors F32",
                   .reference_perplexity = 7,
                   .kl_divergence = {.mean = 0.25, .standard_error = 0.01},
                   .top1_agreement = 0.75};
    evaluate::TaskReport& task = report.tasks.emplace_back();
    task.name = "piqa";
    task.items = 9;
    task.score.accuracy = {.mean = 0.5, .standard_error = 0.1};
    task.score.accuracy_norm = {.mean = 0.625, .standard_error = 0.2};
    report.warnings.emplace_back("short");
    return report;
  };
  v1::TextEvaluation& text = *request_.mutable_text();
  text.set_format(v1::TextEvaluation::WIKITEXT);
  text.set_window(128);
  text.set_stride(64);
  text.set_max_windows(7);
  text.set_reference("/original");
  request_.add_tasks()->set_uri("/piqa.jsonl");
  request_.mutable_tasks(0)->set_limit(9);
  request_.set_skip_bos(true);
  ASSERT_OK_AND_ASSIGN(const Response::Result result, Call());

  EXPECT_EQ(seen.artifact_directory, root_ + "/m");
  EXPECT_EQ(seen.text->path, "/roots/text.txt");
  EXPECT_EQ(seen.text->name, "/text.txt");
  EXPECT_TRUE(seen.text->joins_rows);
  EXPECT_EQ(seen.text->window, 128);
  EXPECT_EQ(seen.text->stride, 64);
  EXPECT_EQ(seen.text->max_windows, 7);
  EXPECT_EQ(seen.text->reference_path, "/roots/original");
  ASSERT_EQ(seen.tasks.size(), 1u);
  EXPECT_EQ(seen.tasks[0].path, "/roots/piqa.jsonl");
  EXPECT_EQ(seen.tasks[0].name, "/piqa.jsonl");
  EXPECT_EQ(seen.tasks[0].limit, 9);
  EXPECT_TRUE(seen.skip_bos);

  EXPECT_THAT(steps_, ::testing::ElementsAre("files", "text", "piqa"));
  EXPECT_EQ(result.model(), "models/m");
  EXPECT_EQ(result.text().perplexity(), 7.4);
  EXPECT_EQ(result.text().kl_divergence(), 0.25);
  EXPECT_EQ(result.text().reference_format(), "safetensors F32");
  ASSERT_EQ(result.tasks_size(), 1);
  EXPECT_EQ(result.tasks(0).accuracy(), 0.5);
  EXPECT_EQ(result.tasks(0).accuracy_norm(), 0.625);
  EXPECT_FALSE(result.tasks(0).has_perplexity());
  EXPECT_THAT(result.warnings(), ::testing::ElementsAre("short"));
}

TEST_F(EvaluationServiceTest, WithoutAReferenceNothingIsSaidOfIt) {
  evaluate_ = [](const EvaluationSpec&, const StepProgress&) {
    EvaluationReport report;
    report.text.emplace();
    return report;
  };
  ASSERT_OK_AND_ASSIGN(const Response::Result result, Call());
  EXPECT_TRUE(result.has_text());
  EXPECT_FALSE(result.text().has_kl_divergence());
  EXPECT_FALSE(result.text().has_reference_perplexity());
}

TEST_F(EvaluationServiceTest, RefusesBadRequests) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  request_.mutable_text()->set_window(5);
  EXPECT_THAT(Call(), StatusIs(invalid, HasSubstr("text.window")));
  request_.mutable_text()->set_window(0);
  request_.mutable_text()->set_uri("/elsewhere");
  EXPECT_THAT(Call(), StatusIs(invalid, HasSubstr("text.uri: is beneath no root")));
  request_.clear_text();
  EXPECT_THAT(Call(), StatusIs(invalid, HasSubstr("nothing to evaluate")));
  request_.add_tasks()->set_uri("/elsewhere");
  EXPECT_THAT(Call(), StatusIs(invalid, HasSubstr("tasks[0].uri: ")));
  request_.mutable_tasks(0)->set_uri("/t");
  request_.set_model("models/unknown");
  EXPECT_THAT(Call(), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(EvaluationServiceTest, RunsOneAtATime) {
  evaluate_ = [this](const EvaluationSpec&, const StepProgress& p) { return Endless(p); };
  grpc::ClientContext first;
  std::thread running([&] { EXPECT_THAT(Call(first), HasCode(absl::StatusCode::kCancelled)); });
  ASSERT_TRUE(WaitUntil([&] { return is_running_.load(); }, absl::Seconds(20)));
  grpc::ClientContext second;
  v1::EvaluateModelResponse response;
  const auto reader = stub_->EvaluateModel(&second, request_);
  EXPECT_FALSE(reader->Read(&response));
  const absl::Status busy = FromGrpcStatus(reader->Finish());
  EXPECT_THAT(busy, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(busy), "EVALUATION_RUNNING");
  first.TryCancel();
  running.join();
  ASSERT_TRUE(WaitUntil([&] { return !is_running_.load(); }, absl::Seconds(20)));
  evaluate_ = [](const EvaluationSpec&, const StepProgress&) { return EvaluationReport(); };
  // The place is free a moment after the evaluation has stopped.
  EXPECT_TRUE(WaitUntil([&] { return Call().ok(); }, absl::Seconds(20)));
}

TEST_F(EvaluationServiceTest, RefusesWhatItsMemoryCannotHold) {
  int64_t bytes_needed = 1000;
  evaluate_ = [&](const EvaluationSpec& spec,
                  const StepProgress&) -> absl::StatusOr<EvaluationReport> {
    if (absl::Status status = spec.check_memory(bytes_needed); !status.ok()) return status;
    return EvaluationReport();
  };
  EXPECT_OK(Call()) << "more than is free now may still fit";
  ++bytes_needed;
  const absl::Status refused = Call().status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition,
                                HasSubstr("the evaluation needs 1001 bytes of memory, the worker "
                                          "has 1000")));
  EXPECT_EQ(ErrorReason(refused), kInsufficientMemory);
}

// A call without a deadline, or one from a coordinator that does not cap it.
TEST_F(EvaluationServiceTest, StopsAfterADayWhateverTheDeadline) {
  evaluate_ = [this](const EvaluationSpec&, const StepProgress& p) { return Endless(p); };
  absl::Status ended;
  std::thread running([&] { ended = Call().status(); });
  ASSERT_TRUE(WaitUntil([&] { return is_running_.load(); }, absl::Seconds(20)));
  manual_clock_.Advance(absl::Hours(24));
  running.join();
  EXPECT_THAT(ended,
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("longer than 86400 s")));
}

TEST_F(EvaluationServiceTest, StopsAtTheDeadline) {
  evaluate_ = [this](const EvaluationSpec&, const StepProgress& p) { return Endless(p); };
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  EXPECT_THAT(Call(context), HasCode(absl::StatusCode::kDeadlineExceeded));
  EXPECT_TRUE(WaitUntil([&] { return !is_running_.load(); }, absl::Seconds(20)));
}

TEST_F(EvaluationServiceTest, StopsWithTheWorker) {
  evaluate_ = [this](const EvaluationSpec&, const StepProgress& p) { return Endless(p); };
  absl::Status ended;
  std::thread running([&] { ended = Call().status(); });
  ASSERT_TRUE(WaitUntil([&] { return is_running_.load(); }, absl::Seconds(20)));
  service_->Stop();
  running.join();
  EXPECT_THAT(ended, HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(ErrorReason(ended), "WORKER_STOPPING");
  EXPECT_THAT(Call(), HasCode(absl::StatusCode::kUnavailable));
}

}  // namespace
}  // namespace walsh::service
