// Goal:   a model in a bucket is quantized as the one on the worker's disk is.
// Method: a coordinator and a whole worker in one process; model and text on moto's S3 server.
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/s3_server.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/tiny_job.h"
#include "walsh/v1/evaluation.grpc.pb.h"
#include "worker/io/random_access_file.h"
#include "worker/kernels/kernels.h"
#include "worker/objects/object_store.h"
#include "worker/service/daemon.h"

namespace walsh {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using v1::QuantizationJob;
using ::walsh::testing::HasCode;
using ::walsh::testing::S3Server;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

class ModelSourcesTest : public CoordinatorFixture {
 protected:
  // Loads OpenBLAS, which is configured through the environment, before other threads run.
  static void SetUpTestSuite() { (void)kernels::DescribeCpuBackend(); }

  void SetUp() override {
    WALSH_REQUIRE_S3();
    ASSERT_OK_AND_ASSIGN(s3_, S3Server::Start());
    for (const auto& [name, value] : s3_->environment()) {
      environment_.push_back(std::make_unique<ScopedEnvironment>(name.c_str(), value.c_str()));
    }
    ASSERT_OK_AND_ASSIGN(store_, objects::OpenObjectStore("--store", Url("")));
    for (const auto& entry : std::filesystem::directory_iterator(job_.root() + "/tiny")) {
      Upload(entry.path().string(), "sources/tiny/" + entry.path().filename().string());
    }
    Upload(job_.root() + "/text.txt", "sources/text.txt");
    CoordinatorFixture::SetUp();
    service::WorkerOptions options;
    options.coordinator = server_->endpoints().at("internal");
    options.grpc_port = options.metrics_port = 0;
    options.data_dir = dir_ / "worker";
    options.model_roots = {job_.root()};
    options.model_url_prefixes = {Url("/sources")};
    options.device = "cpu";
    options.threads = 1;
    ASSERT_OK_AND_ASSIGN(worker_,
                         service::Daemon::Start(options, {.cuda = {}, .on_device_broken = [] {}}));
    ASSERT_TRUE(WaitUntil([&] {
      return Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                           v1::ListWorkersRequest())
                 ->workers_size() > 0;
    }));
  }
  void TearDown() override {
    if (worker_ != nullptr) worker_->Stop();
  }

  static std::string Url(const std::string& key) {
    return absl::StrCat("s3://", S3Server::kBucket, key);
  }
  void Upload(const std::string& path, const std::string& key) {
    const std::string contents = ReadSmallFile(path, 1 << 24).value();
    ASSERT_OK(store_->Put(key, contents));
  }
  v1::CreateQuantizationJobRequest RequestOfBucket(const std::string& id) const {
    v1::CreateQuantizationJobRequest request = job_.Request(id);
    request.mutable_quantization_job()->set_source_model(Url("/sources/tiny"));
    request.mutable_quantization_job()->mutable_config()->mutable_calibration()->set_uri(
        Url("/sources/text.txt"));
    return request;
  }
  QuantizationJob AwaitEnd(const std::string& id) {
    EXPECT_TRUE(WaitUntil([&] { return Get(id)->has_end_time(); }));
    return *Get(id);
  }

  std::unique_ptr<S3Server> s3_;
  std::vector<std::unique_ptr<ScopedEnvironment>> environment_;
  std::unique_ptr<objects::ObjectStore> store_;
  const testing::TinyJob job_;
  std::unique_ptr<service::Daemon> worker_;
};

TEST_F(ModelSourcesTest, GiveTheSameArtifactAsAFolder) {
  v1::CreateQuantizationJobRequest preflight = RequestOfBucket("b");
  preflight.set_validate_only(true);
  ASSERT_OK_AND_ASSIGN(const QuantizationJob planned, Create(preflight));
  EXPECT_GT(planned.preflight().memory().bytes_needed(), 0);

  ASSERT_OK(Create(job_.Request("a")));
  ASSERT_OK(Create(RequestOfBucket("b")));
  const QuantizationJob from_folder = AwaitEnd("a");
  const QuantizationJob from_bucket = AwaitEnd("b");
  ASSERT_EQ(from_folder.state(), QuantizationJob::SUCCEEDED) << from_folder.error().message();
  ASSERT_EQ(from_bucket.state(), QuantizationJob::SUCCEEDED) << from_bucket.error().message();
  EXPECT_EQ(from_folder.result().sha256(), from_bucket.result().sha256());
  const auto stages = [](const QuantizationJob& job) {
    std::vector<QuantizationJob::Stage> found;
    for (const auto& time : job.result().stage_times()) found.push_back(time.stage());
    return found;
  };
  EXPECT_THAT(stages(from_bucket), Contains(QuantizationJob::FETCHING));
  EXPECT_THAT(stages(from_folder), ::testing::Not(Contains(QuantizationJob::FETCHING)));

  // The original, and a text, for an evaluation.
  const auto evaluate = [&](const std::string& text, const std::string& reference) {
    v1::EvaluateModelRequest request;
    request.set_model("models/model-b");
    request.mutable_text()->set_uri(text);
    request.mutable_text()->set_reference(reference);
    request.mutable_text()->set_window(32);
    request.mutable_text()->set_max_windows(2);
    grpc::ClientContext context;
    const auto stub = v1::EvaluationService::NewStub(channel_);
    const auto reader = stub->EvaluateModel(&context, request);
    v1::EvaluateModelResponse response;
    while (reader->Read(&response)) {
    }
    EXPECT_OK(FromGrpcStatus(reader->Finish()));
    return response.result().text().kl_divergence();
  };
  const double kl_divergence = evaluate(job_.root() + "/text.txt", job_.root() + "/tiny");
  EXPECT_GT(kl_divergence, 0);
  EXPECT_EQ(evaluate(Url("/sources/text.txt"), Url("/sources/tiny")), kl_divergence);
}

TEST_F(ModelSourcesTest, AreRefusedBeforeTheJobIsStored) {
  const auto create = [&](const std::string& source) {
    v1::CreateQuantizationJobRequest request = RequestOfBucket("c");
    request.mutable_quantization_job()->set_source_model(source);
    return Create(request).status();
  };
  EXPECT_THAT(create(Url("/by/boto3")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--model-url-prefix")));
  EXPECT_THAT(create(Url("/sources/../by/boto3")), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(create("https://example.org/model"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is a URL")));
  EXPECT_THAT(create(Url("/sources/absent")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/sources/absent' does not exist")));
  ASSERT_OK(store_->Put("sources/empty/config.json", "{}"));
  EXPECT_THAT(create(Url("/sources/empty")), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Get("c"), HasCode(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace walsh
