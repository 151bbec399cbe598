// Real handshakes on loopback: who is served, who is not, and that nobody is refused while files
// change.
#include "common/grpc_security.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/certificates.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::CertificateAuthority;
using ::walsh::testing::HasCode;
using ::walsh::testing::Issued;
using ::walsh::testing::IssueOptions;
using ::walsh::testing::MetricValue;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TempDir;

class CountingService : public v1::GenerationService::Service {
 public:
  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest*,
                        v1::TokenizeResponse*) override {
    ++n_calls;
    return grpc::Status::OK;
  }
  std::atomic<int> n_calls = 0;
};

struct SecuredServer {
  explicit SecuredServer(const PortSecurity& security) {
    grpc::ServerBuilder builder;
    ApplyServerLimits(builder);
    builder.AddListeningPort("127.0.0.1:0", MakeServerCredentials(security), &port);
    builder.RegisterService(&service);
    server = builder.BuildAndStart();
  }
  ~SecuredServer() { server->Shutdown(std::chrono::system_clock::now()); }

  // On a connection of its own, with a handshake of its own.
  absl::Status Call(const ChannelSecurity& security) {
    static std::atomic<int> n_connections = 0;
    const auto stub = v1::GenerationService::NewStub(
        MakeChannel(absl::StrCat("127.0.0.1:", port), ++n_connections, security));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    v1::TokenizeResponse response;
    return FromGrpcStatus(stub->Tokenize(&context, {}, &response));
  }

  CountingService service;
  int port = 0;
  std::unique_ptr<grpc::Server> server;
};

ChannelSecurity Security(const std::string& ca, const Issued& issued = {}) {
  ChannelSecurity security;
  security.tls = std::make_shared<const TlsPems>(
      TlsPems{.certificate = issued.certificate, .private_key = issued.private_key, .ca = ca});
  return security;
}

class GrpcSecurityTest : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.tls = {
        .certificate = dir_ / "tls.crt", .private_key = dir_ / "tls.key", .ca = dir_ / "ca.crt"};
    ASSERT_OK(PublishFile(options_.tls.ca, ca_.pem()));
    Write(ca_.Issue());
  }
  void Write(const Issued& issued) {
    ASSERT_OK(PublishFile(options_.tls.private_key, issued.private_key));
    ASSERT_OK(PublishFile(options_.tls.certificate, issued.certificate));
  }
  void WriteTokens(const std::string& lines) {
    options_.worker_token_file = dir_ / "token";
    ASSERT_OK(PublishFile(options_.worker_token_file, lines));
  }

  const TempDir dir_;
  CertificateAuthority ca_{"the service's CA"};
  CertificateAuthority stranger_{"another CA"};
  DaemonSecurity::Options options_;
};

TEST_F(GrpcSecurityTest, WithoutFilesPortsAreOpen) {
  ASSERT_OK_AND_ASSIGN(const auto security, DaemonSecurity::Open({}));
  SecuredServer server(security->internal_port());
  EXPECT_OK(server.Call(security->to_coordinator()));
  EXPECT_OK(server.Call({}));
}

TEST_F(GrpcSecurityTest, ACaWithoutACertificateIsRefused) {
  options_.tls.certificate = options_.tls.private_key = "";
  EXPECT_THAT(DaemonSecurity::Open(options_).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls-ca needs --tls-cert")));
}

TEST_F(GrpcSecurityTest, DaemonsKnowEachOtherByTheirCa) {
  ASSERT_OK_AND_ASSIGN(const auto security, DaemonSecurity::Open(options_));
  SecuredServer server(security->internal_port());
  EXPECT_OK(server.Call(security->to_coordinator()));
  const struct {
    const char* who;
    ChannelSecurity security;
  } kStrangers[] = {
      {"no TLS", {}},
      {"no certificate", Security(ca_.pem())},
      {"another CA's", Security(ca_.pem(), stranger_.Issue())},
      {"expired", Security(ca_.pem(), ca_.Issue({.expires = absl::Now() - absl::Seconds(5)}))},
      {"a server's only", Security(ca_.pem(), ca_.Issue({.uses = "serverAuth"}))},
      {"knows another CA", Security(stranger_.pem(), ca_.Issue())},
  };
  for (const auto& stranger : kStrangers) {
    EXPECT_THAT(server.Call(stranger.security), HasCode(absl::StatusCode::kUnavailable))
        << stranger.who;
  }
  EXPECT_EQ(server.service.n_calls, 1);
  EXPECT_OK(server.Call(security->to_coordinator())) << "those did no harm";
}

TEST_F(GrpcSecurityTest, ClientsOfThePublicPortShowACertificateOnlyWhereTheirCaIsGiven) {
  ASSERT_OK_AND_ASSIGN(const auto open, DaemonSecurity::Open(options_));
  SecuredServer server(open->public_port(nullptr));
  EXPECT_OK(server.Call(Security(ca_.pem())));

  CertificateAuthority clients("the clients' CA");
  options_.tls.client_ca = dir_ / "clients.crt";
  ASSERT_OK(PublishFile(options_.tls.client_ca, clients.pem()));
  ASSERT_OK_AND_ASSIGN(const auto asks, DaemonSecurity::Open(options_));
  SecuredServer asking(asks->public_port(nullptr));
  EXPECT_OK(asking.Call(Security(ca_.pem(), clients.Issue())));
  EXPECT_THAT(asking.Call(Security(ca_.pem())), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(asking.Call(asks->to_coordinator()), HasCode(absl::StatusCode::kUnavailable))
      << "a daemon is no client";
  SecuredServer internal(asks->internal_port());
  EXPECT_THAT(internal.Call(Security(ca_.pem(), clients.Issue())),
              HasCode(absl::StatusCode::kUnavailable))
      << "a client is no daemon";
}

TEST_F(GrpcSecurityTest, ACertificateMustHaveTheNameThatIsCalled) {
  Write(ca_.Issue({.names = "DNS:worker.walsh"}));
  ASSERT_OK_AND_ASSIGN(const auto nameless, DaemonSecurity::Open(options_));
  SecuredServer server(nameless->internal_port());
  EXPECT_THAT(server.Call(nameless->to_worker()), HasCode(absl::StatusCode::kUnavailable));
  options_.worker_name = "worker.walsh";
  ASSERT_OK_AND_ASSIGN(const auto named, DaemonSecurity::Open(options_));
  EXPECT_OK(server.Call(named->to_worker()));
}

TEST_F(GrpcSecurityTest, DaemonsKnowEachOtherByTheirToken) {
  options_.tls = {};
  WriteTokens("0123456789abcdef\n");
  ASSERT_OK_AND_ASSIGN(const auto security, DaemonSecurity::Open(options_));
  SecuredServer server(security->internal_port());
  EXPECT_OK(server.Call(security->to_coordinator()));
  const double before = MetricValue("walsh_auth_rejections_total", {R"(code="UNAUTHENTICATED")"});
  for (const char* secret : {"", "0123456789abcdeX", "0123456789abcde", "x"}) {
    EXPECT_THAT(server.Call({.secret = secret}),
                StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("daemons")));
  }
  EXPECT_EQ(server.service.n_calls, 1) << "no handler saw the others";
  EXPECT_EQ(MetricValue("walsh_auth_rejections_total", {R"(code="UNAUTHENTICATED")"}), before + 4);
}

// Both tokens are taken while daemons get the new one, one after the other.
TEST_F(GrpcSecurityTest, ATokenIsReplacedWithoutARefusal) {
  options_.tls = {};
  options_.reload_interval = absl::Milliseconds(5);
  WriteTokens("old-old-old-old-old\nnew-new-new-new-new\n");
  ASSERT_OK_AND_ASSIGN(const auto security, DaemonSecurity::Open(options_));
  SecuredServer server(security->internal_port());
  EXPECT_EQ(security->to_worker().secret, "old-old-old-old-old");
  EXPECT_OK(server.Call({.secret = "new-new-new-new-new"}));
  WriteTokens("new-new-new-new-new\n");
  ASSERT_TRUE(
      testing::WaitUntil([&] { return security->to_worker().secret == "new-new-new-new-new"; }));
  EXPECT_OK(server.Call(security->to_worker()));
  EXPECT_THAT(server.Call({.secret = "old-old-old-old-old"}),
              HasCode(absl::StatusCode::kUnauthenticated));
}

TEST_F(GrpcSecurityTest, ChecksSeeTheMethodAndMayRefuse) {
  ASSERT_OK_AND_ASSIGN(const auto security, DaemonSecurity::Open({}));
  std::string seen;
  SecuredServer server(
      security->public_port([&](std::string_view method, std::string_view authorization) {
        seen = absl::StrCat(std::string(method), " ", std::string(authorization));
        return absl::PermissionDeniedError("not you");
      }));
  EXPECT_THAT(server.Call({.secret = "secret"}),
              StatusIs(absl::StatusCode::kPermissionDenied, "not you"));
  EXPECT_EQ(seen, "/walsh.v1.GenerationService/Tokenize Bearer secret");
  EXPECT_EQ(server.service.n_calls, 0);
}

// Row J2 of the fault matrix: a hundred renewals, each with what may come between, while clients
// begin connection after connection.
TEST_F(GrpcSecurityTest, ARenewalFailsNoHandshake) {
  ASSERT_OK_AND_ASSIGN(const auto tls, WatchTlsFiles(options_.tls));
  SecuredServer server({.tls = tls.get(), .caller_ca = &TlsPems::ca});
  const ChannelSecurity client = Security(ca_.pem(), ca_.Issue());
  std::atomic<bool> is_over = false;
  std::atomic<int> n_failed = 0;
  std::atomic<int> n_done = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 2; ++i) {
    clients.emplace_back([&] {
      while (!is_over) {
        if (!server.Call(client).ok()) ++n_failed;
        ++n_done;
      }
    });
  }
  for (int round = 0; round < 100; ++round) {
    const Issued next = ca_.Issue();
    const std::function<void()> kDisturbances[] = {
        [&] { ASSERT_OK(PublishFile(options_.tls.private_key, next.private_key)); },
        [&] { ASSERT_OK(PublishFile(options_.tls.certificate, "garbage")); },
        [&] { ASSERT_OK(RemoveTree(options_.tls.certificate)); },
        [&] { Write(ca_.Issue({.expires = absl::Now() - absl::Seconds(5)})); },
        [&] { ASSERT_OK(PublishFile(options_.tls.private_key, "")); },
    };
    kDisturbances[round % std::size(kDisturbances)]();
    tls->Poll();
    Write(next);
    tls->Poll();
    ASSERT_EQ(tls->Get()->certificate, next.certificate);
  }
  const int n_before = n_done;
  EXPECT_TRUE(testing::WaitUntil([&] { return n_done >= n_before + 10; }));
  is_over = true;
  for (std::thread& thread : clients) thread.join();
  EXPECT_EQ(n_failed, 0) << "of " << n_done;
}

}  // namespace
}  // namespace walsh
