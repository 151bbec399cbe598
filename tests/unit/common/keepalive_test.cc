// Client and server of the keepalive pair on a quiet stream.
//
// gRPC sends at most one ping a second, so the pair's times are divided by 20: in six seconds its
// client pings six times, and a server that it does not fit would have cut it off after the third.
#include <gmock/gmock.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "absl/synchronization/notification.h"
#include "common/grpc_server.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kQuietTime = absl::Seconds(6);

// Sends nothing for kQuietTime, then ends the stream.
class QuietService : public v1::GenerationService::Service {
 public:
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest*,
                              grpc::ServerWriter<v1::GenerateStreamResponse>*) override {
    absl::Notification never;
    const absl::Time end = absl::Now() + kQuietTime;
    while (absl::Now() < end && !context->IsCancelled()) {
      never.WaitForNotificationWithTimeout(absl::Milliseconds(20));
    }
    return grpc::Status::OK;
  }
};

grpc::Status QuietStream(const Keepalive& client, const Keepalive& server_keepalive) {
  QuietService service;
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder, server_keepalive);
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  const auto stub = v1::GenerationService::NewStub(
      MakeChannel("127.0.0.1:" + std::to_string(port), /*connection=*/0, /*security=*/{}, client));
  grpc::ClientContext context;
  auto reader = stub->GenerateStream(&context, {});
  v1::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  const grpc::Status status = reader->Finish();
  server->Shutdown(std::chrono::system_clock::now());
  return status;
}

constexpr Keepalive kScaled = {
    .client_interval_ms = kKeepalive.client_interval_ms / 20,
    .server_interval_ms = kKeepalive.server_interval_ms / 20,
    .timeout_ms = kKeepalive.timeout_ms,
    .server_min_ping_interval_ms = kKeepalive.server_min_ping_interval_ms / 20,
    .server_ping_strikes_max = kKeepalive.server_ping_strikes_max,
};

TEST(KeepaliveTest, ThePairNeverTrips) {
  const grpc::Status status = QuietStream(kScaled, kScaled);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

// Shows that the test above can fail: the same client, and a server twenty times as strict.
TEST(KeepaliveTest, AnImpatientClientIsCutOff) {
  const grpc::Status status = QuietStream(kScaled, kKeepalive);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("ping"));
}

}  // namespace
}  // namespace walsh
