// Goal:   a model that fails its job's quality gate is not there, and the job says why.
// Method: jobs of 2 bits through the real service, one with a gate that nothing passes and one with
//         a gate that everything does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "common/grpc_status.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TestModel;

namespace fs = std::filesystem;

class QualityGateTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_OK(service_.Start()); }

  v1::CreateQuantizationJobRequest Request(const std::string& id, double max_ratio, double max_kl) {
    v1::CreateQuantizationJobRequest request;
    request.set_quantization_job_id(id);
    v1::QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(model_.path());
    job.set_model_name(id);
    v1::QuantizationConfig& config = *job.mutable_config();
    config.set_bits(2);
    config.mutable_calibration()->set_uri(model_.text_path());
    config.mutable_calibration()->set_num_samples(8);
    config.mutable_calibration()->set_sequence_length(128);
    config.mutable_evaluation()->set_max_windows(4);
    config.mutable_evaluation()->set_sequence_length(128);
    config.mutable_auto_load();
    config.mutable_quality_gate()->set_max_perplexity_ratio(max_ratio);
    config.mutable_quality_gate()->set_max_kl_divergence(max_kl);
    return request;
  }

  absl::StatusOr<v1::QuantizationJob> Run(const v1::CreateQuantizationJobRequest& request) {
    const auto created = service_.client().CreateJob(request);
    if (!created.ok()) return created;
    return service_.client().WatchJob(created->name(), 0, {});
  }

  const TestModel model_;
  ServiceFixture service_{{.model_roots = {model_.root()}}};
};

TEST_F(QualityGateTest, AModelThatFailsIsKeptApart) {
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, Run(Request("bad", 1e6, 1e-9)));
  EXPECT_EQ(job.state(), v1::QuantizationJob::FAILED);
  EXPECT_EQ(job.error_reason(), "QUALITY_GATE");
  EXPECT_EQ(job.attempt(), 1);
  EXPECT_THAT(FromProtoStatus(job.error()), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                     HasSubstr("at most 1e-09 is allowed")));
  EXPECT_GT(job.result().kl_divergence(), 1e-9);
  EXPECT_GT(job.result().perplexity_before(), 1);
  EXPECT_GT(job.result().perplexity_after(), 1);
  EXPECT_GT(job.result().per_layer_size(), 0);
  EXPECT_EQ(job.result().artifact_uri(), "");

  // Not listed, not loadable, its name is free.
  EXPECT_THAT(service_.client().GetModel("bad"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(service_.client().LoadModel("bad"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_FALSE(fs::exists(service_.worker_data_dir() + "/models/bad"));
  EXPECT_TRUE(fs::exists(service_.worker_data_dir() + "/rejected/bad/walsh.json"));

  ASSERT_OK_AND_ASSIGN(const client::Output report, service_.RunWalsh({"jobs", "get", "bad"}));
  EXPECT_THAT(report.out, AllOf(HasSubstr("FAILED_PRECONDITION"), HasSubstr("(QUALITY_GATE)"),
                                HasSubstr("nats a token from the original")));

  // Another job may have the name, and a worker that starts anew does not find the old model.
  service_.KillWorker();
  ASSERT_OK(service_.StartWorker());
  v1::CreateQuantizationJobRequest again = Request("good", 1e6, 1e6);
  again.mutable_quantization_job()->set_model_name("bad");
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob good, Run(again));
  EXPECT_EQ(good.state(), v1::QuantizationJob::SUCCEEDED) << good.error().message();
  ASSERT_OK_AND_ASSIGN(const v1::Model model, service_.client().GetModel("bad"));
  EXPECT_EQ(model.quantization_job(), "quantizationJobs/good");
  EXPECT_EQ(model.state(), v1::Model::READY);
}

TEST_F(QualityGateTest, EachFlagIsAGate) {
  ASSERT_OK_AND_ASSIGN(const client::Output output,
                       service_.RunWalsh({"quantize", model_.path(), "--name", "m", "--bits", "2",
                                          "--calibration", model_.text_path(), "--num-samples", "8",
                                          "--seq-len", "128", "--eval-windows", "4",
                                          "--max-perplexity-ratio", "1", "--max-kl", "1e-9"}));
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_THAT(output.err, AllOf(HasSubstr("failed the quality gate"), HasSubstr("1e-09")));
  EXPECT_THAT(output.out, HasSubstr("QUALITY_GATE"));

  ASSERT_OK_AND_ASSIGN(const client::Output refused,
                       service_.RunWalsh({"quantize", model_.path(), "--name", "m", "--no-eval",
                                          "--max-perplexity-ratio", "1.5"}));
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("quality_gate"), HasSubstr("needs an evaluation")));
}

}  // namespace
}  // namespace walsh
