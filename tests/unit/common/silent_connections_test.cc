// Row E13 of the fault matrix: connections on which nothing sensible comes do not stay.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpc/impl/codegen/grpc_types.h>
#include <grpcpp/server.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/publish.h"
#include "tests/testing/certificates.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh {
namespace {

class EchoService : public v1::GenerationService::Service {
 public:
  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest*,
                        v1::TokenizeResponse*) override {
    return grpc::Status::OK;
  }
};

class Loopback {
 public:
  struct Options {
    PortSecurity security = {};
    int idle_ms = limits::kConnectionIdleMsMax;
  };
  explicit Loopback(const Options& options) {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS,
                               options.idle_ms);  // of two the first counts
    ApplyServerLimits(builder);
    builder.AddListeningPort("127.0.0.1:0", MakeServerCredentials(options.security), &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
  }
  ~Loopback() { server_->Shutdown(std::chrono::system_clock::now()); }

  int port() const { return port_; }
  std::shared_ptr<grpc::Channel> Channel(const ChannelSecurity& security = {}) const {
    return MakeChannel("127.0.0.1:" + std::to_string(port_), /*connection=*/0, security);
  }

 private:
  EchoService service_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

absl::Status Call(const std::shared_ptr<grpc::Channel>& channel) {
  const auto stub = v1::GenerationService::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
  v1::TokenizeResponse response;
  return FromGrpcStatus(stub->Tokenize(&context, {}, &response));
}

class Socket {
 public:
  explicit Socket(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    EXPECT_EQ(connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  ~Socket() { close(fd_); }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;

  void Send(const std::string& bytes) const {
    EXPECT_EQ(send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }
  // Whether the server closes it until then; what it says before is read away.
  bool ClosesBefore(absl::Time deadline) const {
    while (true) {
      const int64_t left_ms = absl::ToInt64Milliseconds(deadline - absl::Now());
      pollfd wanted = {.fd = fd_, .events = POLLIN, .revents = 0};
      if (poll(&wanted, 1, static_cast<int>(std::max<int64_t>(left_ms, 0))) <= 0) return false;
      char buffer[4096];
      if (recv(fd_, buffer, sizeof buffer, 0) <= 0) return true;
    }
  }

 private:
  const int fd_;
};

TEST(SilentConnectionsTest, AreDroppedAfterTheHandshakesTime) {
  const testing::TempDir dir;
  testing::CertificateAuthority ca;
  const testing::Issued issued = ca.Issue();
  ASSERT_OK(PublishFile(dir / "ca.crt", ca.pem()));
  ASSERT_OK(PublishFile(dir / "tls.crt", issued.certificate));
  ASSERT_OK(PublishFile(dir / "tls.key", issued.private_key));
  ASSERT_OK_AND_ASSIGN(const auto security,
                       DaemonSecurity::Open({.tls = {.certificate = dir / "tls.crt",
                                                     .private_key = dir / "tls.key",
                                                     .ca = dir / "ca.crt"}}));
  const Loopback plain({});
  const Loopback secured({.security = security->public_port(/*check=*/{})});
  const absl::Time start = absl::Now();
  std::vector<std::unique_ptr<Socket>> sockets;
  for (const Loopback* loopback : {&plain, &secured}) {
    for (int i = 0; i < 100; ++i) sockets.push_back(std::make_unique<Socket>(loopback->port()));
  }
  sockets.push_back(std::make_unique<Socket>(plain.port()));
  sockets.back()->Send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");  // and no settings
  sockets.push_back(std::make_unique<Socket>(secured.port()));
  sockets.back()->Send("\x16\x03\x01");  // the beginning of a greeting
  const absl::Duration limit = absl::Milliseconds(limits::kHandshakeMsMax);
  EXPECT_FALSE(sockets.front()->ClosesBefore(start + limit / 2)) << "a slow one has that long";
  EXPECT_OK(Call(plain.Channel())) << "others do not wait for them";
  EXPECT_OK(Call(secured.Channel(security->to_coordinator())));
  for (const auto& socket : sockets) {
    ASSERT_TRUE(socket->ClosesBefore(start + limit + absl::Seconds(5)));
  }
}

TEST(SilentConnectionsTest, JunkEndsAConnectionAtOnce) {
  const Loopback loopback({});
  for (const std::string& junk : {std::string("GET / HTTP/1.1\r\n\r\n"), std::string(100, '\xff'),
                                  std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 9)}) {
    const Socket socket(loopback.port());
    socket.Send(junk);
    EXPECT_TRUE(socket.ClosesBefore(absl::Now() + absl::Seconds(5)));
  }
  EXPECT_OK(Call(loopback.Channel()));
}

TEST(SilentConnectionsTest, AConnectionWithoutCallsIsGivenUp) {
  const Loopback loopback({.idle_ms = 500});
  const auto channel = loopback.Channel();
  EXPECT_OK(Call(channel));
  EXPECT_EQ(channel->GetState(/*try_to_connect=*/false), GRPC_CHANNEL_READY);
  EXPECT_TRUE(channel->WaitForStateChange(GRPC_CHANNEL_READY,
                                          absl::ToChronoTime(absl::Now() + absl::Seconds(10))));
  EXPECT_OK(Call(channel)) << "the next call opens another";
}

}  // namespace
}  // namespace walsh
