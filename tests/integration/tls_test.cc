// Goal:   the daemons and the command over mutual TLS, with keys and the daemons' secret, as an
//         operator sets them up, and a renewal of the certificates under them; secrets are in no
//         output (row J4 of the fault matrix).
// Method: the real daemons, with certificates that are made here.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "common/sha256.h"
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
using ::walsh::testing::StatusIs;
using ::walsh::testing::TempDir;
using ::walsh::testing::TestModel;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

constexpr char kApiKey[] = "canary-of-the-api-key";
constexpr char kPrompt[] = "Once upon a canary";
constexpr char kToken[] = "canary-of-the-worker-token";

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK(PublishFile(dir_ / "ca.crt", ca_.pem()));
    Write(ca_.Issue());
    testing::ServiceOptions options;
    options.model_roots = {model_.root()};
    options.worker_flags = {
        "--tls-cert",    dir_ / "tls.crt",      "--tls-key",    dir_ / "tls.key", "--tls-ca",
        dir_ / "ca.crt", "--worker-token-file", dir_ / "token", "--log-level",    "debug"};
    options.coordinator_flags = options.worker_flags;
    options.coordinator_flags.insert(options.coordinator_flags.end(),
                                     {"--api-keys-file", dir_ / "keys.json"});
    ASSERT_OK(PublishFile(dir_ / "token", kToken));
    ASSERT_OK(PublishFile(dir_ / "key", kApiKey));
    ASSERT_OK(
        PublishFile(dir_ / "keys.json",
                    absl::StrCat(R"({"keys": [{"id": "k", "tenant": "t", "sha256": ")",
                                 Sha256Hex(kApiKey), R"(", "roles": ["submit", "serve"]}]})")));
    options.security.secret = kApiKey;
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
    job.mutable_config()->mutable_calibration()->set_num_samples(4);
    job.mutable_config()->mutable_calibration()->set_sequence_length(64);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    job.mutable_config()->mutable_auto_load();
    auto created = service_->client().CreateJob(request);
    if (!created.ok()) return created.status();
    return service_->client().WatchJob(created->name(), 0, {});
  }

  absl::Status Generate() {
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt(kPrompt);
    request.mutable_sampling()->set_max_tokens(4);
    return service_->client().Generate(request).status();
  }

  static absl::Status TokenizeAt(const std::string& address, const ChannelSecurity& security) {
    const auto stub = v1::GenerationService::NewStub(MakeChannel(address, 1, security));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    v1::TokenizeResponse response;
    return FromGrpcStatus(stub->Tokenize(&context, {}, &response));
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

  // The key's roles, and no key at all.
  EXPECT_THAT(service_->client().UnloadModel("m").status(),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("'admin'")));
  client::ClientOptions keyless;
  keyless.address = service_->endpoint("coordinator", "grpc");
  keyless.security.tls = std::make_shared<const TlsPems>(TlsPems{.ca = ca_.pem()});
  EXPECT_THAT(client::Client(keyless).ListModels().status(),
              HasCode(absl::StatusCode::kUnauthenticated));
  EXPECT_OK(client::Client(keyless).CheckHealth("", absl::Seconds(20)));

  // A daemon's certificate without the daemons' secret.
  ChannelSecurity no_secret;
  const Issued another = ca_.Issue();
  no_secret.tls = std::make_shared<const TlsPems>(TlsPems{
      .certificate = another.certificate, .private_key = another.private_key, .ca = ca_.pem()});
  EXPECT_THAT(TokenizeAt(service_->endpoint("worker", "grpc"), no_secret),
              HasCode(absl::StatusCode::kUnauthenticated));

  // Strangers: in plain, and without a certificate where daemons call each other.
  client::ClientOptions plain;
  plain.address = service_->endpoint("coordinator", "grpc");
  plain.attempts_max = 1;
  EXPECT_THAT(client::Client(plain).ListModels().status(), HasCode(absl::StatusCode::kUnavailable));
  ChannelSecurity no_certificate;
  no_certificate.tls = std::make_shared<const TlsPems>(TlsPems{.ca = ca_.pem()});
  for (const auto& address :
       {service_->endpoint("worker", "grpc"), service_->endpoint("coordinator", "internal")}) {
    EXPECT_THAT(TokenizeAt(address, no_certificate), HasCode(absl::StatusCode::kUnavailable));
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
  for (const char* secret : {kApiKey, kPrompt, kToken, "PRIVATE KEY"}) {
    for (const char* daemon : {"coordinator", "worker"}) {
      EXPECT_THAT(service_->Log(daemon), Not(HasSubstr(secret)));
      EXPECT_THAT(Metrics(daemon), Not(HasSubstr(secret)));
    }
  }

  // The command.
  ASSERT_OK_AND_ASSIGN(const client::Output listed,
                       service_->RunWalsh({"--tls-ca", dir_ / "ca.crt", "--api-key-file",
                                           dir_ / "key", "models", "list"}));
  EXPECT_EQ(listed.exit_code, 0) << listed.err;
  EXPECT_THAT(listed.out, HasSubstr("m2"));
}

}  // namespace
}  // namespace walsh
