// A real server and channel on loopback, with the service's own settings.
#include "common/grpc_server.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/metrics.h"
#include "tests/testing/status_matchers.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::HasCode;

// Tokenize answers what its text says; GenerateStream waits until it is cancelled.
class FakeService : public v1::GenerationService::Service {
 public:
  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse*) override {
    if (request->text() != "fail") return grpc::Status::OK;
    absl::Status status = absl::ResourceExhaustedError(std::string(3000, '\n'));
    SetErrorInfo(status, "FULL", {{"detail", std::string(1500, 'd')}});
    status.SetPayload("type.googleapis.com/large", absl::Cord(std::string(20'000, 'x')));
    return ToGrpcStatus(status);
  }
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest*,
                              grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    writer->Write({});
    writer->Write({});
    absl::Notification never;
    while (!context->IsCancelled()) never.WaitForNotificationWithTimeout(absl::Milliseconds(5));
    return grpc::Status::CANCELLED;
  }
};

struct Loopback {
  Loopback() {
    grpc::ServerBuilder builder;
    ApplyServerLimits(builder);
    AddServerInterceptors(builder);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service);
    server = builder.BuildAndStart();
  }
  ~Loopback() { server->Shutdown(std::chrono::system_clock::now()); }
  std::string address() const { return "127.0.0.1:" + std::to_string(port); }
  std::unique_ptr<v1::GenerationService::Stub> Stub() {
    return v1::GenerationService::NewStub(MakeChannel(address()));
  }

  FakeService service;
  int port = 0;
  std::unique_ptr<grpc::Server> server;
};

absl::Status Tokenize(v1::GenerationService::Stub& stub, const std::string& text) {
  grpc::ClientContext context;
  v1::TokenizeRequest request;
  request.set_text(text);
  v1::TokenizeResponse response;
  return FromGrpcStatus(stub.Tokenize(&context, request, &response));
}

TEST(GrpcServerTest, LargeStatusesArriveWithinTheMetadataLimit) {
  Loopback loopback;
  const absl::Status status = Tokenize(*loopback.Stub(), "fail");
  EXPECT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(status), "FULL");
}

TEST(GrpcServerTest, MessagesAboveTheLimitAreRefused) {
  Loopback loopback;
  const auto stub = loopback.Stub();
  EXPECT_OK(Tokenize(*stub, std::string(limits::kMessageBytesMax - 100, 'x')));
  EXPECT_THAT(Tokenize(*stub, std::string(limits::kMessageBytesMax + 1, 'x')),
              HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_OK(Tokenize(*stub, "still alive"));
}

TEST(GrpcServerTest, MetadataAboveTheLimitIsRefused) {
  Loopback loopback;
  const auto stub = loopback.Stub();
  {
    grpc::ClientContext context;
    context.AddMetadata("x-large", std::string(limits::kMetadataBytesMax - 1024, 'x'));
    v1::TokenizeResponse response;
    EXPECT_OK(FromGrpcStatus(stub->Tokenize(&context, {}, &response)));
  }
  grpc::ClientContext context;
  context.AddMetadata("x-large", std::string(2 * limits::kMetadataBytesMax, 'x'));
  v1::TokenizeResponse response;
  EXPECT_THAT(FromGrpcStatus(stub->Tokenize(&context, {}, &response)),
              HasCode(absl::StatusCode::kResourceExhausted));
  // Of another connection: gRPC may close the one that carried it.
  const auto other = v1::GenerationService::NewStub(MakeChannel(loopback.address(), 1));
  EXPECT_OK(Tokenize(*other, "still alive"));
}

TEST(GrpcServerTest, StreamsBeyondTheLimitOfAConnectionWait) {
  Loopback loopback;
  const auto stub = loopback.Stub();
  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> reader;
  };
  std::vector<std::unique_ptr<Stream>> streams;
  v1::GenerateStreamResponse response;
  for (int i = 0; i < limits::kConcurrentStreamsMax; ++i) {
    Stream& stream = *streams.emplace_back(std::make_unique<Stream>());
    stream.reader = stub->GenerateStream(&stream.context, {});
    ASSERT_TRUE(stream.reader->Read(&response)) << i;
  }
  grpc::ClientContext one_too_many;
  one_too_many.set_deadline(absl::ToChronoTime(absl::Now() + absl::Milliseconds(200)));
  auto waiting = stub->GenerateStream(&one_too_many, {});
  EXPECT_FALSE(waiting->Read(&response));
  EXPECT_EQ(waiting->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  // One that ends makes room.
  streams.front()->context.TryCancel();
  EXPECT_EQ(streams.front()->reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  grpc::ClientContext next;
  auto stream = stub->GenerateStream(&next, {});
  EXPECT_TRUE(stream->Read(&response));
  next.TryCancel();
  for (const auto& open : streams) open->context.TryCancel();
}

// The callback API's handler of last resort passes the interceptors, under the caller's name.
TEST(GrpcServerTest, UnknownMethodsAreUnimplementedAndNoLabels) {
  grpc::ServerBuilder builder;
  AddServerInterceptors(builder);
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  v1::GenerationService::CallbackService service;
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  grpc::GenericStub stub(MakeChannel("127.0.0.1:" + std::to_string(port)));
  for (const char* method : {"/walsh.v1.GenerationService/NoSuchMethod", "/no.such.Service/At"}) {
    grpc::ClientContext context;
    const grpc::Slice empty;
    const grpc::ByteBuffer request(&empty, 1);
    grpc::ByteBuffer response;
    grpc::Status status;
    absl::Notification done;
    stub.UnaryCall(&context, method, grpc::StubOptions(), &request, &response, [&](grpc::Status s) {
      status = std::move(s);
      done.Notify();
    });
    done.WaitForNotification();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED) << status.error_message();
  }
  server->Shutdown(std::chrono::system_clock::now());
  EXPECT_THAT(metrics::Render(), Not(HasSubstr("NoSuchMethod")));
  EXPECT_THAT(metrics::Render(), HasSubstr("grpc_method=\"unknown\""));
}

TEST(GrpcServerTest, ATakenPortIsNotShared) {
  Loopback loopback;
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  builder.AddListeningPort(loopback.address(), grpc::InsecureServerCredentials());
  FakeService service;
  builder.RegisterService(&service);
  EXPECT_EQ(builder.BuildAndStart(), nullptr);
}

TEST(GrpcServerTest, TakesAllDescriptorsThatItMay) {
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  limit.rlim_cur = limit.rlim_max / 2;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  Loopback loopback;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_EQ(limit.rlim_cur, limit.rlim_max);
}

double Value(const std::string& series) {
  const std::string text = metrics::Render();
  const size_t at = text.find("\n" + series + " ");
  return at == std::string::npos ? -1 : std::stod(text.substr(at + series.size() + 2));
}

TEST(GrpcServerTest, CountsEveryRpc) {
  const std::string tokenize =
      R"(grpc_method="Tokenize",grpc_service="walsh.v1.GenerationService",grpc_type="unary")";
  const std::string stream =
      R"(grpc_method="GenerateStream",grpc_service="walsh.v1.GenerationService",grpc_type="server_stream")";
  const auto unary_labels = [&](const std::string& code) {
    return R"({grpc_code=")" + code + R"(",)" + tokenize + "}";
  };
  Loopback loopback;
  const auto stub = loopback.Stub();
  const double failed_before =
      std::max(0.0, Value("grpc_server_handled_total" + unary_labels("ResourceExhausted")));
  const double started_before = std::max(0.0, Value("grpc_server_started_total{" + tokenize + "}"));
  const std::map<std::string, double> of_stream = {
      {"grpc_server_started_total{" + stream + "}", 1},
      {"grpc_server_msg_received_total{" + stream + "}", 1},
      {"grpc_server_msg_sent_total{" + stream + "}", 2},
      {R"(grpc_server_handled_total{grpc_code="Canceled",)" + stream + "}", 1},
      {"grpc_server_handling_seconds_count{" + stream + "}", 1},
  };
  std::map<std::string, double> stream_before;  // of other tests in this process
  for (const auto& [series, n] : of_stream) stream_before[series] = std::max(0.0, Value(series));
  EXPECT_OK(Tokenize(*stub, "a"));
  EXPECT_FALSE(Tokenize(*stub, "fail").ok());
  {
    grpc::ClientContext context;
    auto reader = stub->GenerateStream(&context, {});
    v1::GenerateStreamResponse response;
    EXPECT_TRUE(reader->Read(&response));
    EXPECT_TRUE(reader->Read(&response));
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  loopback.server->Shutdown();  // handlers have ended, so their metrics are final
  EXPECT_EQ(Value("grpc_server_started_total{" + tokenize + "}"), started_before + 2);
  EXPECT_EQ(Value("grpc_server_handled_total" + unary_labels("ResourceExhausted")),
            failed_before + 1);
  for (const auto& [series, n] : of_stream) {
    EXPECT_EQ(Value(series), stream_before[series] + n) << series;
  }
}

}  // namespace
}  // namespace walsh
