// What KEDA hears of the jobs, from a coordinator on loopback.
#include "common/publish.h"
#include "externalscaler/externalscaler.grpc.pb.h"
#include "tests/integration/coordinator_fixture.h"

namespace walsh {
namespace {

using externalscaler::ExternalScaler;
using externalscaler::IsActiveResponse;
using externalscaler::ScaledObjectRef;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;
using Stub = ExternalScaler::Stub;

constexpr char kMetric[] = "walsh-quantization-jobs";

class ExternalScalerTest : public CoordinatorFixture {
 protected:
  void SetUp() override {
    CoordinatorFixture::SetUp();
    scaler_ = ExternalScaler::NewStub(MakeChannel(server_->endpoints().at("internal")));
  }

  bool IsActive() {
    const auto response = Send<IsActiveResponse>(scaler_.get(), &Stub::IsActive, ScaledObjectRef());
    EXPECT_OK(response);
    return response.ok() && response->result();
  }
  absl::StatusOr<externalscaler::GetMetricsResponse> GetMetrics(const std::string& metric) {
    externalscaler::GetMetricsRequest request;
    request.set_metricname(metric);
    return Send<externalscaler::GetMetricsResponse>(scaler_.get(), &Stub::GetMetrics, request);
  }
  int64_t NumJobs() {
    const auto response = GetMetrics(kMetric);
    EXPECT_OK(response);
    if (!response.ok() || response->metricvalues_size() != 1) return -1;
    const externalscaler::MetricValue& value = response->metricvalues(0);
    EXPECT_EQ(value.metricname(), kMetric);
    EXPECT_EQ(value.metricvaluefloat(), static_cast<double>(value.metricvalue()));
    return value.metricvalue();
  }
  absl::StatusOr<externalscaler::GetMetricSpecResponse> GetMetricSpec(
      const std::string& jobs_per_worker) {
    ScaledObjectRef object;
    (*object.mutable_scalermetadata())["jobsPerWorker"] = jobs_per_worker;
    return Send<externalscaler::GetMetricSpecResponse>(scaler_.get(), &Stub::GetMetricSpec, object);
  }

  std::unique_ptr<Stub> scaler_;
};

// KEDA has no secret to show.
TEST_F(ExternalScalerTest, AsksWithoutTheDaemonsToken) {
  Stop();
  options_.security.worker_token_file = dir_ / "token";
  ASSERT_OK(PublishFile(options_.security.worker_token_file, "a-token-of-the-daemons-alone"));
  Start();
  EXPECT_FALSE(IsActive());
  testing::FakeWorker stranger(server_->endpoints().at("internal"), "w1");
  EXPECT_THAT(stranger.Register(), HasCode(absl::StatusCode::kUnauthenticated));
}

TEST_F(ExternalScalerTest, CountsJobsThatWaitAndThatRun) {
  EXPECT_FALSE(IsActive());
  EXPECT_EQ(NumJobs(), 0);
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_OK(Create(NewJob("b")));
  EXPECT_TRUE(IsActive());
  EXPECT_EQ(NumJobs(), 2);

  const auto worker = NewWorker("w1");
  ASSERT_OK(worker->Acquire());
  EXPECT_EQ(NumJobs(), 2) << "a worker is not taken from the job that it runs";
  ASSERT_OK(Cancel("quantizationJobs/b"));
  EXPECT_EQ(NumJobs(), 1);
}

TEST_F(ExternalScalerTest, StreamTellsEachChange) {
  grpc::ClientContext context;
  const auto stream = scaler_->StreamIsActive(&context, ScaledObjectRef());
  IsActiveResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_FALSE(response.result());
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_TRUE(response.result());
  ASSERT_OK(Create(NewJob("b")));  // no change
  ASSERT_OK(Cancel("quantizationJobs/a"));
  ASSERT_OK(Cancel("quantizationJobs/b"));
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_FALSE(response.result());
  context.TryCancel();
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// It needs no secret.
TEST_F(ExternalScalerTest, StreamsAreLimited) {
  constexpr int kMax = 16;
  struct Open {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<IsActiveResponse>> stream;
  };
  std::vector<std::unique_ptr<Open>> open;
  const auto is_taken = [&] {
    open.push_back(std::make_unique<Open>());
    open.back()->stream = scaler_->StreamIsActive(&open.back()->context, ScaledObjectRef());
    IsActiveResponse response;
    return open.back()->stream->Read(&response);
  };
  for (int i = 0; i < kMax; ++i) ASSERT_TRUE(is_taken()) << i;
  EXPECT_FALSE(is_taken());
  EXPECT_EQ(open.back()->stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  open.front()->context.TryCancel();
  EXPECT_TRUE(WaitUntil(is_taken)) << "one has ended";
  for (const auto& one : open) one->context.TryCancel();
}

TEST_F(ExternalScalerTest, StreamEndsWhenTheCoordinatorStops) {
  grpc::ClientContext context;
  const auto stream = scaler_->StreamIsActive(&context, ScaledObjectRef());
  IsActiveResponse response;
  ASSERT_TRUE(stream->Read(&response));
  Stop(absl::Seconds(10));
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ExternalScalerTest, TargetIsOfTheTrigger) {
  const auto spec = Send<externalscaler::GetMetricSpecResponse>(scaler_.get(), &Stub::GetMetricSpec,
                                                                ScaledObjectRef());
  ASSERT_OK(spec);
  ASSERT_EQ(spec->metricspecs_size(), 1);
  EXPECT_EQ(spec->metricspecs(0).metricname(), kMetric);
  EXPECT_EQ(spec->metricspecs(0).targetsize(), 1);
  const auto four = GetMetricSpec("4");
  ASSERT_OK(four);
  EXPECT_EQ(four->metricspecs(0).targetsizefloat(), 4);
}

TEST_F(ExternalScalerTest, WhatIsWrongIsNamed) {
  for (const char* wrong : {"", "0", "-1", "1001", "1.5", "many"}) {
    EXPECT_THAT(GetMetricSpec(wrong),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("jobsPerWorker")))
        << wrong;
  }
  EXPECT_THAT(GetMetrics("gpus"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("gpus")));
}

}  // namespace
}  // namespace walsh
