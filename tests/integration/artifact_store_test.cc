// Goal:   a model that was acknowledged outlives the machine that made it.
// Method: a coordinator and two whole workers with folders of their own in one process. The first
//         makes a model and is gone with its folder; the second fetches, loads and serves it. The
//         store is a folder, and a real S3 server.
#include <functional>
#include <optional>

#include "common/publish.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/s3_server.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/tiny_job.h"
#include "worker/kernels/kernels.h"
#include "worker/objects/object_store.h"
#include "worker/service/daemon.h"

namespace walsh {
namespace {

using service::Daemon;
using service::WorkerOptions;
using ::testing::IsEmpty;
using ::testing::Not;
using v1::QuantizationJob;
using ::walsh::testing::HasCode;
using ::walsh::testing::S3Server;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::WaitUntil;

class ArtifactStoreTest : public CoordinatorFixture {
 protected:
  // Loads OpenBLAS, which is configured through the environment, before other threads run.
  static void SetUpTestSuite() { (void)kernels::DescribeCpuBackend(); }

  void SetUp() override {}  // what stores the models is set before the coordinator starts

  // Begins with what sets the environment, so before any thread.
  void UseFolder() {
    location_ = "file:" + (dir_ / "store");
    CoordinatorFixture::SetUp();
  }
  void UseS3() {
    WALSH_REQUIRE_S3();
    absl::StatusOr<std::unique_ptr<S3Server>> s3 = S3Server::Start();
    ASSERT_OK(s3);
    s3_ = *std::move(s3);
    for (const auto& [name, value] : s3_->environment()) {
      environment_.push_back(std::make_unique<ScopedEnvironment>(name.c_str(), value.c_str()));
    }
    location_ = absl::StrCat("s3://", S3Server::kBucket, "/fleet");
    CoordinatorFixture::SetUp();
  }

  std::unique_ptr<Daemon> StartWorker(const std::string& name, bool has_store = true) {
    WorkerOptions options;
    options.coordinator = server_->endpoints().at("internal");
    options.grpc_port = options.metrics_port = 0;
    options.data_dir = dir_ / name;
    options.model_roots = {job_.root()};
    options.device = "cpu";
    options.threads = 1;
    if (has_store) options.artifact_store = location_;
    if (s3_ != nullptr) options.checkpoint_dir = location_;
    absl::StatusOr<std::unique_ptr<Daemon>> daemon =
        Daemon::Start(options, {.cuda = {}, .on_device_broken = [] {}});
    EXPECT_OK(daemon);
    EXPECT_TRUE(WaitUntil([&] {
      return Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                           v1::ListWorkersRequest())
                 ->workers_size() > 0;
    }));
    return daemon.ok() ? *std::move(daemon) : nullptr;
  }

  void MakeModel() {
    ASSERT_OK(Create(job_.Request("a")));
    ASSERT_TRUE(WaitUntil([&] { return Get("a")->state() == QuantizationJob::SUCCEEDED; }));
    model_ = "models/" + Get("a")->model_name();
  }
  absl::Status Load() {
    v1::LoadModelRequest request;
    request.set_name(model_);
    return Send<v1::Model>(models_.get(), &ModelStub::LoadModel, request).status();
  }
  absl::Status Delete() {
    v1::DeleteModelRequest request;
    request.set_name(model_);
    return Send<google::protobuf::Empty>(models_.get(), &ModelStub::DeleteModel, request).status();
  }
  absl::StatusOr<v1::GenerateResponse> Generate() {
    v1::GenerateRequest request;
    request.set_model(model_);
    request.set_prompt("Row 1");
    request.mutable_sampling()->set_max_tokens(4);
    return Send<v1::GenerateResponse>(generation_.get(), &GenerationStub::Generate, request);
  }
  std::vector<objects::ObjectStore::Listed> Stored(const std::string& folder) {
    return objects::OpenObjectStore("--store", location_).value()->List(folder).value();
  }

  void OutlivesItsWorker() {
    {
      const std::unique_ptr<Daemon> first = StartWorker("first");
      MakeModel();
      EXPECT_THAT(Stored("models"), Not(IsEmpty())) << "before the job has ended";
      EXPECT_TRUE(WaitUntil([&] { return Stored("checkpoints").empty(); })) << "after that";
      first->Stop();
    }
    ASSERT_OK(RemoveTree(dir_ / "first"));
    {
      const std::unique_ptr<Daemon> other = StartWorker("other", /*has_store=*/false);
      EXPECT_THAT(Load(), HasCode(absl::StatusCode::kUnavailable));
      other->Stop();
    }
    const std::unique_ptr<Daemon> second = StartWorker("second");
    ASSERT_OK(Load());
    ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse generated, Generate());
    EXPECT_GT(generated.usage().completion_tokens(), 0);
    EXPECT_THAT(Delete(), HasCode(absl::StatusCode::kFailedPrecondition)) << "it is loaded";
    v1::UnloadModelRequest unload;
    unload.set_name(model_);
    ASSERT_OK(Send<v1::Model>(models_.get(), &ModelStub::UnloadModel, unload));
    ASSERT_OK(Delete());
    EXPECT_THAT(Stored("models"), IsEmpty());
    second->Stop();
  }

  std::unique_ptr<S3Server> s3_;
  std::vector<std::unique_ptr<ScopedEnvironment>> environment_;
  const testing::TinyJob job_;
  std::string location_;
  std::string model_;
};

TEST_F(ArtifactStoreTest, AModelInAFolderOutlivesItsWorker) {
  ASSERT_NO_FATAL_FAILURE(UseFolder());
  OutlivesItsWorker();
}

TEST_F(ArtifactStoreTest, AModelInS3OutlivesItsWorker) {
  ASSERT_NO_FATAL_FAILURE(UseS3());
  if (IsSkipped()) return;
  OutlivesItsWorker();
}

// As of a job that was cancelled after its worker had copied the model and died.
TEST_F(ArtifactStoreTest, AModelWithoutARecordCanBeDeletedFromTheStore) {
  ASSERT_NO_FATAL_FAILURE(UseFolder());
  const std::unique_ptr<Daemon> worker = StartWorker("first");
  ASSERT_OK(objects::OpenObjectStore("--store", location_)
                .value()
                ->Put("models/model-a/model.json",
                      R"({"format_version": 1, "job": "quantizationJobs/old", "fencing_token": 1,
                          "files": {}})"));
  ASSERT_OK(Create(job_.Request("a")));
  ASSERT_TRUE(WaitUntil([&] { return Get("a")->state() == QuantizationJob::FAILED; }));
  EXPECT_EQ(Get("a")->error_reason(), "MODEL_EXISTS");
  model_ = "models/model-a";
  ASSERT_OK(Delete());
  EXPECT_THAT(Delete(), HasCode(absl::StatusCode::kNotFound));
  v1::CreateQuantizationJobRequest again = job_.Request("b");
  again.mutable_quantization_job()->set_model_name("model-a");
  ASSERT_OK(Create(again));
  EXPECT_TRUE(WaitUntil([&] { return Get("b")->state() == QuantizationJob::SUCCEEDED; }));
  worker->Stop();
}

TEST_F(ArtifactStoreTest, AModelThatNoWorkerHasIsDeletedFromTheStore) {
  ASSERT_NO_FATAL_FAILURE(UseFolder());
  {
    const std::unique_ptr<Daemon> first = StartWorker("first");
    MakeModel();
    first->Stop();
  }
  const std::unique_ptr<Daemon> second = StartWorker("second");
  ASSERT_OK(Delete());
  EXPECT_THAT(Stored("models"), IsEmpty());
  EXPECT_THAT(Load(), HasCode(absl::StatusCode::kNotFound));
  second->Stop();
}

}  // namespace
}  // namespace walsh
