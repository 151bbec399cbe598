#include "worker/service/model_loader.h"

#include <gtest/gtest.h>

#include "common/grpc_status.h"
#include "tests/testing/fake_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "worker/kernels/device_failure.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

class ModelLoaderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::TinyModel({}).WriteHf(dir_ / "source");
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK(testing::WriteTinyArtifact(*checkpoint, dir_ / "artifact"));
    device_.name = "cuda:1 NVIDIA H200";
    device_.cuda_device = 1;
    cuda_.load = [this](const std::string&, const engine::CudaModelOptions& options)
        -> absl::StatusOr<std::shared_ptr<engine::ServedModel>> {
      EXPECT_EQ(options.device, 1);
      EXPECT_TRUE(options.batch_invariant);
      EXPECT_EQ(options.kv_cache_dtype, KvCacheDtype::kInt4);
      ++n_device_loads_;
      if (!on_device_.ok()) return on_device_;
      return std::make_shared<testing::FakeModel>();
    };
  }
  absl::StatusOr<std::shared_ptr<engine::ServedModel>> Load() {
    return MakeModelLoader(
        device_, cuda_,
        {.n_threads = 2, .batch_invariant = true, .kv_cache_dtype = KvCacheDtype::kInt4},
        [this](const absl::Status& status) { broken_ = status; })(dir_ / "artifact");
  }
  bool IsFake(const engine::ServedModel& model) { return model.config().vocab == 258; }

  testing::TempDir dir_;
  JobDevice device_;
  CudaDevices cuda_;
  absl::Status on_device_;
  absl::Status broken_;
  int n_device_loads_ = 0;
};

TEST_F(ModelLoaderTest, TheDeviceServesWhatItCan) {
  ASSERT_OK_AND_ASSIGN(const auto model, Load());
  EXPECT_TRUE(IsFake(*model));
  EXPECT_OK(broken_);
}

TEST_F(ModelLoaderTest, TheCpuServesTheRest) {
  on_device_ = absl::UnimplementedError("no CUDA kernels for heads of 8");
  ASSERT_OK_AND_ASSIGN(const auto model, Load());
  EXPECT_FALSE(IsFake(*model));
  EXPECT_EQ(n_device_loads_, 1);
}

TEST_F(ModelLoaderTest, WithoutADeviceTheCpuServesAll) {
  device_.cuda_device.reset();
  ASSERT_OK_AND_ASSIGN(const auto model, Load());
  EXPECT_FALSE(IsFake(*model));
  EXPECT_EQ(n_device_loads_, 0);
}

TEST_F(ModelLoaderTest, OtherErrorsStand) {
  on_device_ = absl::ResourceExhaustedError("needs 9 bytes, 8 are free");
  EXPECT_THAT(Load().status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("8 are free")));
  EXPECT_OK(broken_);
}

TEST_F(ModelLoaderTest, ABrokenDeviceIsTold) {
  on_device_ = MarkDeviceBroken(absl::InternalError("an illegal address"));
  const absl::Status status = Load().status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("an illegal address")));
  EXPECT_EQ(ErrorReason(status), kDeviceBroken);
  EXPECT_TRUE(IsDeviceBroken(broken_));
}

}  // namespace
}  // namespace walsh::service
