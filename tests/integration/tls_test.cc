// Goal:   the daemons and the command over mutual TLS, as an operator sets them up, and a renewal
//         of the certificates under them.
// Method: the real daemons, with certificates that are made here.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/certificates.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::CertificateAuthority;
using ::walsh::testing::HasCode;
using ::walsh::testing::Issued;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TempDir;
using ::walsh::testing::TestModel;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(PublishFile(dir_ / "ca.crt", ca_.pem()));
    Write(ca_.Issue());
    testing::ServiceOptions options;
    options.model_roots = {model_.root()};
    options.coordinator_flags = {"--tls-cert",     dir_ / "tls.crt", "--tls-key",
                                 dir_ / "tls.key", "--tls-ca",       dir_ / "ca.crt"};
    options.worker_flags = options.coordinator_flags;
    options.security.tls = std::make_shared<const TlsPems>(TlsPems{.ca = ca_.pem()});
    service_ = std::make_unique<ServiceFixture>(options);
    ASSERT_OK(service_->Start());
  }

  void Write(const Issued& issued) {
    ASSERT_OK(PublishFile(dir_ / "tls.key", issued.private_key));
    ASSERT_OK(PublishFile(dir_ / "tls.crt", issued.certificate));
  }

  absl::StatusOr<Job> Quantize(const std::string& name) {
    v1::CreateQuantizationJobRequest request;
    Job& job = *request.mutable_quantization_job();
    job.set_source_model(model_.path());
    job.set_model_name(name);
    job.mutable_config()->set_method(v1::QuantizationConfig::RTN);
    job.mutable_config()->mutable_rotation()->set_kind(v1::Rotation::NONE);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    job.mutable_config()->mutable_auto_load();
    auto created = service_->client().CreateJob(request);
    if (!created.ok()) return created.status();
    return service_->client().WatchJob(created->name(), 0, {});
  }

  absl::Status Generate() {
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt("Once upon a time");
    request.mutable_sampling()->set_max_tokens(4);
    return service_->client().Generate(request).status();
  }

  std::string Metrics(const std::string& daemon) const {
    return testing::HttpGet(service_->endpoint(daemon, "metrics"), "/metrics").value_or("");
  }

  const TestModel model_;
  const TempDir dir_;
  CertificateAuthority ca_;
  std::unique_ptr<ServiceFixture> service_;
};

TEST_F(TlsTest, AServiceQuantizesAndServesOverItAndRenewsItsCertificates) {
  ASSERT_OK_AND_ASSIGN(const Job job, Quantize("m"));
  ASSERT_EQ(job.state(), Job::SUCCEEDED) << job.DebugString();
  ASSERT_OK(Generate());

  // Strangers: in plain, and without a certificate where daemons call each other.
  client::ClientOptions plain;
  plain.address = service_->endpoint("coordinator", "grpc");
  plain.attempts_max = 1;
  EXPECT_THAT(client::Client(plain).ListModels().status(), HasCode(absl::StatusCode::kUnavailable));
  ChannelSecurity no_certificate;
  no_certificate.tls = std::make_shared<const TlsPems>(TlsPems{.ca = ca_.pem()});
  for (const auto& address :
       {service_->endpoint("worker", "grpc"), service_->endpoint("coordinator", "internal")}) {
    const auto stub = v1::GenerationService::NewStub(MakeChannel(address, 1, no_certificate));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    v1::TokenizeResponse response;
    EXPECT_THAT(FromGrpcStatus(stub->Tokenize(&context, {}, &response)),
                HasCode(absl::StatusCode::kUnavailable));
  }

  // A bad pair changes nothing.
  constexpr char kGood[] = R"(walsh_config_last_reload_successful{config="tls"} 1)";
  constexpr char kBad[] = R"(walsh_config_last_reload_successful{config="tls"} 0)";
  EXPECT_THAT(Metrics("worker"), HasSubstr(kGood));
  const Issued next = ca_.Issue({.expires = absl::FromUnixSeconds(4'000'000'000)});
  ASSERT_OK(PublishFile(dir_ / "tls.key", next.private_key));
  for (const char* daemon : {"coordinator", "worker"}) {
    EXPECT_TRUE(WaitUntil([&] { return Metrics(daemon).find(kBad) != std::string::npos; }));
    EXPECT_THAT(service_->Log(daemon), HasSubstr("the last good ones stay in use"));
  }
  ASSERT_OK(Generate());

  // A good one is taken by both, and calls go on in both directions.
  Write(next);
  constexpr char kExpiry[] = "walsh_tls_certificate_expiry_timestamp_seconds 4000000000";
  for (const char* daemon : {"coordinator", "worker"}) {
    EXPECT_TRUE(WaitUntil([&] { return Metrics(daemon).find(kExpiry) != std::string::npos; }));
    EXPECT_THAT(Metrics(daemon), HasSubstr(kGood));
  }
  ASSERT_OK(Generate());
  ASSERT_OK_AND_ASSIGN(const Job again, Quantize("m2"));
  EXPECT_EQ(again.state(), Job::SUCCEEDED) << again.DebugString();
  for (const char* daemon : {"coordinator", "worker"}) {
    EXPECT_THAT(service_->Log(daemon), Not(HasSubstr("PRIVATE KEY")));
  }

  // The command.
  ASSERT_OK_AND_ASSIGN(const client::Output listed,
                       service_->RunWalsh({"--tls-ca", dir_ / "ca.crt", "models", "list"}));
  EXPECT_EQ(listed.exit_code, 0) << listed.err;
  EXPECT_THAT(listed.out, HasSubstr("m2"));
}

}  // namespace
}  // namespace walsh
