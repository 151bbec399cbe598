// Goal:   `walsh eval` through coordinator and worker: figures of a published model, and clear
//         refusals.
// Method: one quantized model on real daemons, evaluated by the command and by the client.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "common/grpc_cancellation.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TestModel;

constexpr char kTask[] =
    R"({"query": "Question: What did the cat do?", "choices": ["It sat.", "Zebra tax."], "gold": 0})"
    "\n"
    R"({"query": "Question: Where is mom?", "choices": ["Sky bolt.", "At home."], "gold": 1})"
    "\n";

class EvalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(PublishFile(texts_ / "t.jsonl", kTask));
    ASSERT_OK(service_.Start());
    v1::CreateQuantizationJobRequest request;
    v1::QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(model_.path());
    job.set_model_name("m");
    v1::QuantizationConfig& config = *job.mutable_config();
    config.set_bits(3);
    config.mutable_calibration()->set_uri(model_.text_path());
    config.mutable_calibration()->set_num_samples(8);
    config.mutable_calibration()->set_sequence_length(128);
    config.mutable_evaluation()->set_uri(model_.text_path());
    config.mutable_evaluation()->set_max_windows(6);
    config.mutable_evaluation()->set_sequence_length(128);
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob created, service_.client().CreateJob(request));
    ASSERT_OK_AND_ASSIGN(job_, service_.client().WatchJob(created.name(), 0, {}));
    ASSERT_EQ(job_.state(), v1::QuantizationJob::SUCCEEDED) << job_.error().message();
  }

  const TestModel model_;
  const testing::TempDir texts_;
  ServiceFixture service_{{.model_roots = {model_.root(), texts_.path()}}};
  v1::QuantizationJob job_;
};

// The model is not loaded: what counts is its artifact.
TEST_F(EvalTest, TheCommandMeasuresWhatTheJobMeasured) {
  ASSERT_OK_AND_ASSIGN(const client::Output output,
                       service_.RunWalsh({"eval", "m", "--text", model_.text_path(), "--windows",
                                          "6", "--window", "128", "--reference", "source",
                                          "--tasks", texts_ / "t.jsonl", "--output", "json"}));
  ASSERT_EQ(output.exit_code, 0) << output.err;
  const auto result = nlohmann::json::parse(output.out);
  EXPECT_EQ(result["model"], "models/m");
  const auto& text = result["text"];
  EXPECT_NEAR(text["perplexity"].get<double>(), job_.result().perplexity_after(), 1e-6);
  EXPECT_NEAR(text["reference_perplexity"].get<double>(), job_.result().perplexity_before(), 1e-6);
  EXPECT_NEAR(text["kl_divergence"].get<double>(), job_.result().kl_divergence(), 1e-9);
  EXPECT_NEAR(text["top1_agreement"].get<double>(), job_.result().top1_agreement(), 1e-12);
  EXPECT_GT(text["perplexity_stderr"].get<double>(), 0);
  ASSERT_EQ(result["tasks"].size(), 1u);
  EXPECT_EQ(result["tasks"][0]["name"], "t");
  EXPECT_EQ(result["tasks"][0]["items"], "2");
  EXPECT_TRUE(result["tasks"][0].contains("accuracy_norm"));

  ASSERT_OK_AND_ASSIGN(
      const client::Output shown,
      service_.RunWalsh({"eval", "models/m", "--tasks", texts_ / "t.jsonl", "--limit", "1"}));
  EXPECT_EQ(shown.exit_code, 0) << shown.err;
  EXPECT_THAT(shown.out, AllOf(HasSubstr("model 'm', evaluated in"), HasSubstr("accuracy norm.")));
  EXPECT_THAT(shown.err, HasSubstr("evaluating t"));
}

// Rows that are joined, windows that overlap and a task, asked of the job by its flags.
TEST_F(EvalTest, TheJobMeasuresWhatTheCommandDoes) {
  ASSERT_OK_AND_ASSIGN(const client::Output made, service_.RunWalsh({"quantize",
                                                                     model_.path(),
                                                                     "--name",
                                                                     "n",
                                                                     "--bits",
                                                                     "3",
                                                                     "--calibration",
                                                                     model_.text_path(),
                                                                     "--num-samples",
                                                                     "8",
                                                                     "--seq-len",
                                                                     "128",
                                                                     "--eval-text",
                                                                     model_.text_path(),
                                                                     "--eval-text-format",
                                                                     "wikitext",
                                                                     "--eval-window",
                                                                     "128",
                                                                     "--eval-stride",
                                                                     "32",
                                                                     "--eval-windows",
                                                                     "5",
                                                                     "--eval-tasks",
                                                                     texts_ / "t.jsonl",
                                                                     "--no-load",
                                                                     "--output",
                                                                     "json"}));
  ASSERT_EQ(made.exit_code, 0) << made.err;
  ASSERT_OK_AND_ASSIGN(
      const client::Output evaluated,
      service_.RunWalsh({"eval", "n", "--text", model_.text_path(), "--text-format", "wikitext",
                         "--window", "128", "--stride", "32", "--windows", "5", "--reference",
                         "source", "--tasks", texts_ / "t.jsonl", "--output", "json"}));
  ASSERT_EQ(evaluated.exit_code, 0) << evaluated.err;
  ASSERT_OK_AND_ASSIGN(const v1::ListQuantizationJobsResponse jobs,
                       service_.client().ListJobs("model_name=n", "", 10));
  ASSERT_EQ(jobs.quantization_jobs_size(), 1);
  const v1::QuantizationJob& job = jobs.quantization_jobs(0);
  const auto result = nlohmann::json::parse(evaluated.out);
  const auto& text = result["text"];
  EXPECT_EQ(text["stride"], 32);
  EXPECT_EQ(text["tokens"], std::to_string(job.result().evaluation_tokens()));
  EXPECT_EQ(job.result().evaluation_tokens(), 127 + 4 * 32);
  EXPECT_NEAR(text["perplexity"].get<double>(), job.result().perplexity_after(), 1e-6);
  EXPECT_NEAR(text["reference_perplexity"].get<double>(), job.result().perplexity_before(), 1e-6);
  EXPECT_NEAR(text["kl_divergence"].get<double>(), job.result().kl_divergence(), 1e-9);
  EXPECT_NEAR(text["top1_agreement"].get<double>(), job.result().top1_agreement(), 1e-12);
  ASSERT_OK_AND_ASSIGN(
      const client::Output plain,
      service_.RunWalsh({"eval", "n", "--text", model_.text_path(), "--window", "128", "--stride",
                         "32", "--windows", "5", "--output", "json"}));
  EXPECT_NE(nlohmann::json::parse(plain.out)["text"]["fingerprint"], text["fingerprint"])
      << "read another way, the text is another";

  ASSERT_EQ(job.result().tasks_size(), 1);
  const v1::TaskResult& after = job.result().tasks(0).after();
  const auto& task = result["tasks"][0];
  EXPECT_EQ(after.name(), "t");
  EXPECT_EQ(after.items(), 2);
  EXPECT_EQ(after.tokens(), std::stoi(task["tokens"].get<std::string>()));
  EXPECT_NEAR(after.accuracy(), task["accuracy"].get<double>(), 1e-12);
  EXPECT_NEAR(after.accuracy_stderr(), task["accuracy_stderr"].get<double>(), 1e-12);
  EXPECT_NEAR(after.accuracy_norm(), task["accuracy_norm"].get<double>(), 1e-12);
  EXPECT_EQ(job.result().tasks(0).before().items(), 2);

  const std::string id = job.name().substr(job.name().find('/') + 1);
  ASSERT_OK_AND_ASSIGN(const client::Output shown, service_.RunWalsh({"jobs", "get", id}));
  EXPECT_THAT(shown.out, AllOf(HasSubstr("accuracy norm. %"), HasSubstr("quantized")));
  const testing::TempDir dir;
  ASSERT_OK_AND_ASSIGN(const client::Output report,
                       service_.RunWalsh({"jobs", "report", id, "--file", dir / "r.html"}));
  ASSERT_EQ(report.exit_code, 0) << report.err;
  ASSERT_OK_AND_ASSIGN(const std::string html, ReadFile(dir / "r.html", 1 << 24));
  EXPECT_THAT(html, HasSubstr("Zero-shot tasks"));
}

TEST_F(EvalTest, RefusesJobsWhoseEvaluationCannotBeDone) {
  const auto quantize = [&](std::vector<std::string> flags) {
    flags.insert(flags.begin(), {"quantize", model_.path(), "--name", "n", "--validate-only"});
    const auto output = service_.RunWalsh(flags);
    EXPECT_OK(output);
    EXPECT_EQ(output->exit_code, 1);
    return output->err;
  };
  EXPECT_THAT(quantize({"--eval-text-format", "wikitext"}),
              AllOf(HasSubstr("config.evaluation.format"), HasSubstr("there is no uri")));
  EXPECT_THAT(quantize({"--eval-window", "64", "--eval-stride", "65"}),
              HasSubstr("config.evaluation.stride: must be 0 or from 1 to 64, is 65"));
  EXPECT_THAT(quantize({"--no-eval", "--eval-tasks", texts_ / "t.jsonl"}),
              HasSubstr("config.evaluation.tasks: is set, but the evaluation is disabled"));
  EXPECT_THAT(quantize({"--eval-tasks", texts_ / "none.jsonl"}),
              AllOf(HasSubstr("NOT_FOUND"), HasSubstr("config.evaluation.tasks[0].uri")));
  EXPECT_THAT(quantize({"--eval-tasks", model_.text_path()}),
              AllOf(HasSubstr("INVALID_ARGUMENT"), HasSubstr("task 1: ")));
}

TEST_F(EvalTest, RefusesWithTheReason) {
  const auto eval = [&](std::vector<std::string> flags) {
    flags.insert(flags.begin(), "eval");
    const auto output = service_.RunWalsh(flags);
    EXPECT_OK(output);
    EXPECT_EQ(output->exit_code, 1);
    return output->err;
  };
  EXPECT_THAT(eval({"m"}), HasSubstr("nothing to evaluate"));
  EXPECT_THAT(eval({"nobody", "--text", model_.text_path()}), HasSubstr("NOT_FOUND"));
  EXPECT_THAT(eval({"m", "--text", "/etc/passwd"}), HasSubstr("text.uri"));
  EXPECT_THAT(eval({"m", "--tasks", texts_ / "none.jsonl"}),
              AllOf(HasSubstr("NOT_FOUND"), HasSubstr("tasks[0].uri")));
  EXPECT_THAT(eval({"m", "--text", model_.text_path(), "--window", "8"}),
              AllOf(HasSubstr("text.window"), HasSubstr("from 32 to 32768")));
  EXPECT_THAT(eval({"m", "--tasks", texts_ / "t.jsonl", "--deadline", "0.001"}),
              HasSubstr("DEADLINE_EXCEEDED"));
}

TEST_F(EvalTest, ACancelledEvaluationMakesRoomForTheNext) {
  v1::EvaluateModelRequest request;
  request.set_model("m");
  request.mutable_text()->set_uri(model_.text_path());
  request.mutable_text()->set_window(128);
  request.mutable_text()->set_stride(1);  // some thousand windows: takes long enough
  Cancellation cancellation;
  std::thread canceller;
  const auto ended = service_.client().EvaluateModel(
      request,
      [&](const v1::EvaluateModelResponse::Progress& progress) {
        if (progress.step() == "text" && !canceller.joinable()) {
          canceller = std::thread([&] { cancellation.Cancel(); });
        }
      },
      &cancellation);
  EXPECT_THAT(ended, HasCode(absl::StatusCode::kCancelled));
  if (canceller.joinable()) canceller.join();
  request.mutable_text()->set_stride(0);
  request.mutable_text()->set_max_windows(1);
  absl::StatusOr<v1::EvaluateModelResponse::Result> next;
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  do {
    next = service_.client().EvaluateModel(request, {});
  } while (absl::IsResourceExhausted(next.status()) && absl::Now() < deadline);
  ASSERT_OK(next);
  EXPECT_EQ(next->text().windows(), 1);
}

TEST_F(EvalTest, TheJobsReportIsAPage) {
  const testing::TempDir dir;
  ASSERT_OK_AND_ASSIGN(
      const client::Output output,
      service_.RunWalsh({"jobs", "report", job_.name(), "--file", dir / "r.html"}));
  ASSERT_EQ(output.exit_code, 0) << output.err;
  ASSERT_OK_AND_ASSIGN(const std::string html, ReadFile(dir / "r.html", 1 << 24));
  EXPECT_THAT(html, AllOf(HasSubstr("<!DOCTYPE html>"), HasSubstr("<polyline"),
                          HasSubstr("EVALUATING"), HasSubstr("KL divergence")));
}

}  // namespace
}  // namespace walsh
