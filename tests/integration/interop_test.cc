// Goal:   a user takes a model to another program, and brings one from there.
// Method: the real daemons and the real client: a small model is quantized, exported in every
//         format, imported again and served.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TempDir;
using ::walsh::testing::TinyModel;

class InteropTest : public ::testing::Test {
 protected:
  void SetUp() override {
    TinyModel({}).WriteHf(dir_ / "source");
    ASSERT_OK(service_.Start());
    v1::CreateQuantizationJobRequest request;
    v1::QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(dir_ / "source");
    job.set_model_name("tiny");
    v1::QuantizationConfig& config = *job.mutable_config();
    config.set_symmetric(true);  // so that every format holds it
    config.mutable_calibration()->set_num_samples(4);
    config.mutable_calibration()->set_sequence_length(64);
    config.mutable_evaluation()->set_disable(true);
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob created, service_.client().CreateJob(request));
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob finished,
                         service_.client().WatchJob(created.name(), 0, {}));
    ASSERT_EQ(finished.state(), v1::QuantizationJob::SUCCEEDED) << finished.DebugString();
  }

  client::Output Walsh(const std::vector<std::string>& arguments) {
    const auto output = service_.RunWalsh(arguments);
    EXPECT_OK(output);
    return output.value_or(client::Output{});
  }

  std::string Answer(const std::string& model) {
    EXPECT_EQ(Walsh({"models", "load", model}).exit_code, 0);
    v1::GenerateRequest request;
    request.set_model(model);
    request.set_prompt("Once upon");
    request.mutable_sampling()->set_max_tokens(12);
    request.mutable_sampling()->set_temperature(0);
    const auto answer = service_.client().Generate(request);
    EXPECT_OK(answer);
    return answer.ok() ? answer->text() : "";
  }

  TempDir dir_;
  ServiceFixture service_{
      {.model_roots = {dir_.path()}, .worker_flags = {"--export-root", dir_ / "exports"}}};
};

TEST_F(InteropTest, AModelGoesToEveryFormatAndComesBack) {
  for (const char* format : {"dequantized", "gptq_v2", "gptq", "compressed-tensors", "gguf"}) {
    const client::Output done = Walsh({"models", "export", "tiny", "--format", format});
    EXPECT_EQ(done.exit_code, 0) << done.err;
    const std::string directory = dir_ / "exports" + ("/tiny-" + std::string(format));
    EXPECT_THAT(done.out, HasSubstr(directory));
    EXPECT_TRUE(fs::exists(directory + "/walsh-export.json")) << directory;
  }
  EXPECT_TRUE(fs::exists(dir_ / "exports/tiny-gguf/tiny.gguf"));
  // --output says how answers are written, as for every other command.
  const client::Output json = Walsh({"models", "export", "tiny", "--format", "gguf", "--output-dir",
                                     "team/tiny", "--output", "json"});
  EXPECT_EQ(json.exit_code, 0) << json.err;
  EXPECT_EQ(nlohmann::json::parse(json.out)["directory"], dir_ / "exports/team/tiny");

  const client::Output imported =
      Walsh({"models", "import", dir_ / "exports/tiny-gptq", "--name", "back"});
  EXPECT_EQ(imported.exit_code, 0) << imported.err;
  EXPECT_THAT(imported.out, HasSubstr("gptq (imported)"));
  // The coordinator learns of it with the worker's next heartbeat.
  ASSERT_TRUE(testing::WaitUntil([&] { return service_.client().GetModel("back").ok(); },
                                 absl::Seconds(20)));
  EXPECT_EQ(Answer("back"), Answer("tiny"));
}

TEST_F(InteropTest, RefusalsReachTheUser) {
  EXPECT_EQ(Walsh({"models", "export", "tiny", "--format", "onnx"}).exit_code, 2);
  const client::Output outside =
      Walsh({"models", "export", "tiny", "--format", "gptq", "--output-dir", "../x"});
  EXPECT_EQ(outside.exit_code, 1);
  EXPECT_THAT(outside.err, HasSubstr("--export-root"));
  const client::Output nobody = Walsh({"models", "export", "nobody", "--format", "gptq"});
  EXPECT_EQ(nobody.exit_code, 1);
  EXPECT_THAT(nobody.err, HasSubstr("nobody"));
  const client::Output plain = Walsh({"models", "import", dir_ / "source", "--name", "n"});
  EXPECT_EQ(plain.exit_code, 1);
  EXPECT_THAT(plain.err, HasSubstr("walsh quantize"));
  const client::Output taken = Walsh({"models", "import", dir_ / "source", "--name", "tiny"});
  EXPECT_EQ(taken.exit_code, 1);
  EXPECT_THAT(taken.err, HasSubstr("is taken by a published model"));
}

TEST_F(InteropTest, AnExportThatItsCallerLeavesIsGone) {
  Cancellation cancellation;
  v1::ExportModelRequest request;
  request.set_name("tiny");
  request.set_format(v1::ExportModelRequest::GPTQ_V2);
  const auto done = service_.client().ExportModel(
      request, [&](const auto&) { cancellation.Cancel(); }, &cancellation);
  EXPECT_THAT(done.status(), HasCode(absl::StatusCode::kCancelled));
  // The worker may have been at its end already; then the export is there, whole.
  EXPECT_TRUE(testing::WaitUntil(
      [&] {
        const std::string directory = dir_ / "exports";
        return !fs::exists(directory + "/.tmp-tiny");
      },
      absl::Seconds(20)));
}

}  // namespace
}  // namespace walsh
