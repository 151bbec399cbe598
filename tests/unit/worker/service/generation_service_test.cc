// GenerationService over loopback, in one process, with a fake model behind a real engine.
#include "worker/service/generation_service.h"

#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "absl/strings/str_split.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/utf8.h"
#include "google/rpc/error_details.pb.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "tests/unit/worker/service/store_fixture.h"

namespace walsh::service {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using v1::GenerateStreamResponse;
using walsh::testing::FakeModel;
using walsh::testing::HasCode;
using walsh::testing::kFakeEos;
using walsh::testing::Pause;
using walsh::testing::StatusIs;
using walsh::testing::WaitUntil;
using Stub = v1::GenerationService::Stub;

class GenerationServiceTest : public StoreFixture {
 protected:
  void SetUp() override { behaviour_.chat_template = "fake"; }

  void TearDown() override {
    stub_.reset();
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
    service_.reset();
    store_.reset();
  }

  // More tokens than the model makes while a test looks at it.
  static constexpr int kEndless = 30000;
  void LetRequestsBeEndless() {
    behaviour_.max_position = 40000;
    engine_options_.kv_cache_tokens = 80000;
  }

  // A worker that serves model "m".
  void Serve() {
    AddArtifact("m");
    OpenStore();
    ASSERT_OK(store_->Load("m"));
    service_ = std::make_unique<GenerationService>(store_.get(), clock_, service_options_);
    grpc::ServerBuilder builder;
    ApplyServerLimits(builder);
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    address_ = "127.0.0.1:" + std::to_string(port);
    stub_ = v1::GenerationService::NewStub(MakeChannel(address_));
  }

  static v1::GenerateRequest Request(const std::string& prompt, int max_tokens) {
    v1::GenerateRequest request;
    request.set_model("models/m");
    request.set_prompt(prompt);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    request.mutable_sampling()->set_temperature(0);
    return request;
  }

  absl::StatusOr<v1::GenerateResponse> Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    const absl::Status status = FromGrpcStatus(stub_->Generate(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

  struct Streamed {
    std::vector<GenerateStreamResponse> messages;
    std::string text;
    std::vector<int32_t> tokens;
    absl::Status status;
  };
  Streamed Stream(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    const auto reader = stub_->GenerateStream(&context, request);
    Streamed streamed;
    GenerateStreamResponse message;
    while (reader->Read(&message)) {
      streamed.text += message.delta().text();
      streamed.tokens.insert(streamed.tokens.end(), message.delta().token_ids().begin(),
                             message.delta().token_ids().end());
      streamed.messages.push_back(message);
    }
    streamed.status = FromGrpcStatus(reader->Finish());
    return streamed;
  }

  engine::Stats Stats() { return store_->TotalStats(); }
  void WaitUntilIdle() {
    EXPECT_TRUE(WaitUntil([this] { return Stats().running + Stats().waiting == 0; }))
        << "requests stay in the engine";
    EXPECT_EQ(Stats().kv_tokens_used, 0);
  }

  std::string address_;
  GenerationService::Options service_options_{.stall_limit = absl::Minutes(10)};
  std::unique_ptr<GenerationService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Stub> stub_;
};

TEST_F(GenerationServiceTest, UnaryAnswersWithTextUsageAndTimings) {
  Serve();
  v1::GenerateRequest request = Request("hello", 12);
  request.set_request_id("mine");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_OK(FromGrpcStatus(stub_->Generate(&context, request, &response)));
  EXPECT_EQ(response.request_id(), "mine");
  EXPECT_EQ(response.model(), "models/m");
  EXPECT_EQ(response.finish_reason(), v1::LENGTH);
  EXPECT_EQ(response.usage().prompt_tokens(), 6);  // with BOS
  EXPECT_EQ(response.usage().completion_tokens(), 12);
  EXPECT_EQ(response.usage().total_tokens(), 18);
  EXPECT_EQ(response.token_ids_size(), 12);
  EXPECT_EQ(response.text().size(), 12u);
  EXPECT_GT(response.timings().time_to_first_token_seconds(), 0);
  const auto header = context.GetServerInitialMetadata().find("x-request-id");
  ASSERT_NE(header, context.GetServerInitialMetadata().end());
  EXPECT_EQ(std::string(header->second.data(), header->second.size()), "mine");
}

TEST_F(GenerationServiceTest, UsageTellsWhatThePrefixCacheHeld) {
  Serve();
  for (const int expected : {0, 32}) {
    ASSERT_OK_AND_ASSIGN(const auto response, Generate(Request(std::string(40, 'x'), 1)));
    EXPECT_EQ(response.usage().prompt_tokens(), 41);
    EXPECT_EQ(response.usage().cached_tokens(), expected);
  }
}

TEST_F(GenerationServiceTest, RequestIdComesFromTheHeader) {
  Serve();
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "from-header");
  v1::GenerateResponse response;
  ASSERT_OK(FromGrpcStatus(stub_->Generate(&context, Request("a", 1), &response)));
  EXPECT_EQ(response.request_id(), "from-header");
}

TEST_F(GenerationServiceTest, RequestIdThatIsNoHeaderIsNotEchoed) {
  Serve();
  v1::GenerateRequest request = Request("a", 1);
  request.set_request_id("naïve id");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_OK(FromGrpcStatus(stub_->Generate(&context, request, &response)));
  EXPECT_EQ(context.GetServerInitialMetadata().count("x-request-id"), 0u);
  EXPECT_EQ(response.request_id(), "naïve id");
}

TEST_F(GenerationServiceTest, StreamEqualsUnary) {
  Serve();
  const v1::GenerateRequest request = Request("hello", 50);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse unary, Generate(request));
  const Streamed streamed = Stream(request);
  ASSERT_OK(streamed.status);
  ASSERT_GE(streamed.messages.size(), 3u);
  EXPECT_TRUE(streamed.messages.front().has_started());
  EXPECT_EQ(streamed.messages.front().started().prompt_tokens(), 6);
  EXPECT_TRUE(streamed.messages.back().has_finished());
  EXPECT_EQ(streamed.messages.back().finished().usage().completion_tokens(), 50);
  EXPECT_EQ(streamed.text, unary.text());
  EXPECT_EQ(streamed.tokens,
            std::vector<int32_t>(unary.token_ids().begin(), unary.token_ids().end()));
}

TEST_F(GenerationServiceTest, DrawnSeedIsReportedAndRepeats) {
  Serve();
  v1::GenerateRequest request = Request("hello", 30);
  request.mutable_sampling()->set_temperature(1.5);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse first, Generate(request));
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse other, Generate(request));
  EXPECT_NE(first.seed(), other.seed());
  EXPECT_NE(first.text(), other.text());
  request.mutable_sampling()->set_seed(first.seed());
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse again, Generate(request));
  EXPECT_EQ(again.text(), first.text());
}

TEST_F(GenerationServiceTest, LogprobsCarryTokenBytes) {
  Serve();
  v1::GenerateRequest request = Request("hello", 3);
  request.mutable_sampling()->set_logprobs(true);
  request.mutable_sampling()->set_top_logprobs(2);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse response, Generate(request));
  ASSERT_EQ(response.logprobs_size(), 3);
  EXPECT_EQ(response.logprobs(0).token(), response.text().substr(0, 1));
  EXPECT_EQ(response.logprobs(0).top_size(), 2);
}

// A model that speaks in three-byte characters, one byte a token.
TEST_F(GenerationServiceTest, EveryChunkIsWholeCharacters) {
  const std::string euro = "€";
  behaviour_.next = [euro](std::span<const int32_t> history) {
    return static_cast<int32_t>(static_cast<unsigned char>(euro[(history.size() - 2) % 3]));
  };
  Serve();
  const Streamed streamed = Stream(Request("x", 8));
  ASSERT_OK(streamed.status);
  for (const auto& message : streamed.messages) EXPECT_TRUE(IsValidUtf8(message.delta().text()));
  EXPECT_EQ(streamed.text, "€€\xEF\xBF\xBD");  // the third is cut after two bytes
}

TEST_F(GenerationServiceTest, StopStringNeverShows) {
  behaviour_.next = [](std::span<const int32_t> history) { return history.back() + 1; };
  Serve();
  v1::GenerateRequest request = Request("a", 20);
  request.mutable_sampling()->add_stop("ghi");
  const Streamed streamed = Stream(request);
  ASSERT_OK(streamed.status);
  EXPECT_EQ(streamed.text, "bcdef");
  EXPECT_EQ(streamed.messages.back().finished().finish_reason(), v1::STOP_SEQUENCE);
  EXPECT_EQ(streamed.messages.back().finished().stop_sequence(), "ghi");
}

TEST_F(GenerationServiceTest, ChatGoesThroughTheTemplate) {
  Serve();
  v1::ChatRequest chat;
  chat.set_model("m");
  v1::ChatMessage& message = *chat.add_messages();
  message.set_role("user");
  message.set_content("hi");
  chat.mutable_sampling()->set_max_tokens(5);
  chat.mutable_sampling()->set_temperature(0);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_OK(FromGrpcStatus(stub_->Chat(&context, chat, &response)));
  v1::GenerateRequest plain = Request("user: hi\nassistant: ", 5);
  plain.set_skip_bos(true);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse expected, Generate(plain));
  EXPECT_EQ(response.text(), expected.text());
}

TEST_F(GenerationServiceTest, ChatWithoutATemplateIsUnimplemented) {
  behaviour_.chat_template.clear();
  Serve();
  v1::ChatRequest chat;
  chat.set_model("m");
  chat.add_messages()->set_role("user");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  EXPECT_THAT(FromGrpcStatus(stub_->Chat(&context, chat, &response)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("no chat template")));
}

TEST_F(GenerationServiceTest, TokenizeAndBack) {
  Serve();
  v1::TokenizeRequest request;
  request.set_model("m");
  request.set_text("héllo");
  request.set_add_special_tokens(true);
  grpc::ClientContext context;
  v1::TokenizeResponse response;
  ASSERT_OK(FromGrpcStatus(stub_->Tokenize(&context, request, &response)));
  EXPECT_EQ(response.token_ids_size(), 7);
  EXPECT_EQ(response.max_model_len(), 256);
  v1::DetokenizeRequest back;
  back.set_model("m");
  *back.mutable_token_ids() = response.token_ids();
  back.set_skip_special_tokens(true);
  grpc::ClientContext second;
  v1::DetokenizeResponse text;
  ASSERT_OK(FromGrpcStatus(stub_->Detokenize(&second, back, &text)));
  EXPECT_EQ(text.text(), "héllo");
  back.add_token_ids(258);
  grpc::ClientContext third;
  EXPECT_THAT(FromGrpcStatus(stub_->Detokenize(&third, back, &text)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("258")));
}

TEST_F(GenerationServiceTest, ErrorsNameTheirReason) {
  Serve();
  AddArtifact("other");
  v1::GenerateRequest request = Request("x", 1);
  request.set_model("models/none");
  EXPECT_THAT(Generate(request).status(),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("models/none")));
  request.set_model("No Such Name");
  EXPECT_THAT(Generate(request).status(), HasCode(absl::StatusCode::kInvalidArgument));
  request = Request("x", 1);
  request.mutable_sampling()->set_temperature(3);
  EXPECT_THAT(Generate(request).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("temperature")));

  const absl::Status too_long = Generate(Request(std::string(300, 'x'), 1)).status();
  EXPECT_THAT(too_long, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("301")));
  EXPECT_THAT(too_long, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("256")));
  EXPECT_EQ(ErrorReason(too_long), "CONTEXT_LENGTH_EXCEEDED");

  ASSERT_OK(store_->Unload("m"));
  const absl::Status unloaded = Generate(Request("x", 1)).status();
  EXPECT_THAT(unloaded, HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(ErrorReason(unloaded), "MODEL_NOT_LOADED");
}

// Holds every step of the model until released, so that a queue can be filled.
class Brake {
 public:
  std::function<absl::Status(const engine::LoadedModel::Batch&)> Hook() {
    return [this](const engine::LoadedModel::Batch&) {
      while (is_on_) Pause(absl::Milliseconds(1));
      return absl::OkStatus();
    };
  }
  void Release() { is_on_ = false; }

 private:
  std::atomic<bool> is_on_ = true;
};

TEST_F(GenerationServiceTest, FullQueueAnswersAtOnceWithARetryDelay) {
  Brake brake;
  behaviour_.before_forward = brake.Hook();
  engine_options_.max_sequences = 1;
  engine_options_.max_waiting = 1;
  Serve();
  std::vector<std::thread> accepted;
  for (int i = 0; i < 2; ++i) {
    accepted.emplace_back([this] { EXPECT_OK(Generate(Request("x", 2))); });
  }
  EXPECT_TRUE(WaitUntil([this] { return Stats().running + Stats().waiting == 2; }));
  // Answered while the others stand still.
  grpc::ClientContext context;
  v1::GenerateResponse response;
  const absl::Status status = FromGrpcStatus(stub_->Generate(&context, Request("x", 2), &response));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("queue is full")));
  const google::rpc::Status details = ToProtoStatus(status);
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_TRUE(details.details(0).Is<google::rpc::RetryInfo>());
  brake.Release();
  for (std::thread& thread : accepted) thread.join();
}

double Cancellations() {
  return testing::MetricValue("walsh_request_cancelled_total", {"model_name=\"m\""});
}

// The model makes no step that the test did not permit, so nothing ends by itself.
class CancelTest : public GenerationServiceTest {
 protected:
  void SetUp() override {
    GenerationServiceTest::SetUp();
    LetRequestsBeEndless();
    // A token must not wait for one that the test does not permit.
    service_options_.stream_interval = absl::ZeroDuration();
    behaviour_.before_forward = [this](const engine::LoadedModel::Batch&) {
      ++n_arrived_;
      if (!WaitUntil([this] { return n_permitted_ >= n_arrived_; })) {
        return absl::InternalError("the test did not permit a step");
      }
      return absl::OkStatus();
    };
    Serve();
  }

  // The cancel is on its way: lets the model make a step at a time until it has arrived.
  void ExpectCancelled(double before) {
    const bool has_left = WaitUntil([&] {
      if (n_arrived_ > n_permitted_) ++n_permitted_;
      return Cancellations() > before;
    });
    EXPECT_TRUE(has_left) << "the engine goes on with a request that was cancelled";
    EXPECT_EQ(Cancellations(), before + 1);
    WaitUntilIdle();
    EXPECT_LT(n_permitted_, kEndless) << "it ended by itself";
  }

  std::atomic<int> n_arrived_ = 0;
  std::atomic<int> n_permitted_ = 0;
};

TEST_F(CancelTest, CancelledStreamLeavesTheEngine) {
  for (int n_tokens = 1; n_tokens < 12; n_tokens += 3) {
    const double before = Cancellations();
    grpc::ClientContext context;
    const auto reader = stub_->GenerateStream(&context, Request("x", kEndless));
    n_permitted_ += n_tokens;
    GenerateStreamResponse message;
    for (int n_read = 0; n_read < n_tokens; n_read += message.delta().token_ids_size()) {
      ASSERT_TRUE(reader->Read(&message));
    }
    context.TryCancel();
    EXPECT_THAT(FromGrpcStatus(reader->Finish()), HasCode(absl::StatusCode::kCancelled));
    ExpectCancelled(before);
    n_permitted_ = n_arrived_.load();
  }
}

TEST_F(CancelTest, CancelledUnaryCallLeavesTheEngine) {
  const double before = Cancellations();
  grpc::ClientContext context;
  std::thread canceller([&] {
    EXPECT_TRUE(WaitUntil([this] { return Stats().running > 0; }));
    context.TryCancel();
  });
  v1::GenerateResponse response;
  EXPECT_THAT(FromGrpcStatus(stub_->Generate(&context, Request("x", kEndless), &response)),
              HasCode(absl::StatusCode::kCancelled));
  canceller.join();
  ExpectCancelled(before);
}

// -- Preparing: rendering and tokenizing

class PreparingTest : public GenerationServiceTest {
 protected:
  void SetUp() override {
    GenerationServiceTest::SetUp();
    behaviour_.before_render = [this] {
      ++n_rendering_;
      EXPECT_TRUE(WaitUntil([this] { return is_released_.load(); }));
    };
  }

  absl::Status Chat() {
    v1::ChatRequest chat;
    chat.set_model("m");
    v1::ChatMessage& message = *chat.add_messages();
    message.set_role("user");
    message.set_content("hi");
    chat.mutable_sampling()->set_max_tokens(3);
    grpc::ClientContext context;
    v1::GenerateResponse response;
    return FromGrpcStatus(stub_->Chat(&context, chat, &response));
  }
  absl::Status Tokenize() {
    v1::TokenizeRequest request;
    request.set_model("m");
    request.set_text("hi");
    grpc::ClientContext context;
    v1::TokenizeResponse response;
    return FromGrpcStatus(stub_->Tokenize(&context, request, &response));
  }

  std::atomic<int> n_rendering_ = 0;
  std::atomic<bool> is_released_ = false;
};

TEST_F(PreparingTest, LongPromptsDoNotHoldUpOtherStreams) {
  LetRequestsBeEndless();
  behaviour_.before_forward = [](const engine::LoadedModel::Batch&) {
    Pause(absl::Milliseconds(2));
    return absl::OkStatus();
  };
  engine_options_.max_waiting = 32;
  Serve();
  const double before = Cancellations();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  const auto reader = stub_->GenerateStream(&context, Request("x", kEndless));
  GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  // As many as gRPC may have threads for callbacks.
  std::vector<std::thread> chats;
  for (int i = 0; i < 16; ++i) chats.emplace_back([this] { EXPECT_OK(Chat()); });
  EXPECT_TRUE(WaitUntil([this] { return n_rendering_ >= 2; }));
  for (int n_read = 0; n_read < 100; n_read += message.delta().token_ids_size()) {
    EXPECT_TRUE(reader->Read(&message)) << "after " << n_read << " tokens";
    if (HasFailure()) break;
  }
  context.TryCancel();
  EXPECT_THAT(FromGrpcStatus(reader->Finish()), HasCode(absl::StatusCode::kCancelled));
  EXPECT_TRUE(WaitUntil([&] { return Cancellations() == before + 1; }));
  EXPECT_EQ(Stats().running, 0);
  is_released_ = true;
  for (std::thread& chat : chats) chat.join();
}

TEST_F(PreparingTest, MoreThanMayWaitAreRefusedAtOnceWithARetryDelay) {
  service_options_.preparing_threads = 1;
  service_options_.preparing_max = 1;
  Serve();
  const auto rejections = [] {
    return testing::MetricValue("walsh_admission_rejections_total",
                                {"model_name=\"m\"", "reason=\"queue_full\""});
  };
  const double before = rejections();
  std::thread running([this] { EXPECT_OK(Chat()); });
  EXPECT_TRUE(WaitUntil([this] { return n_rendering_ == 1; }));
  // One waits; which of the two that come is refused is theirs to settle.
  std::atomic<int> n_refused = 0;
  const auto come = [&] {
    const absl::Status status = Tokenize();
    if (status.ok()) return;
    ++n_refused;
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1 requests")));
    const google::rpc::Status details = ToProtoStatus(status);
    ASSERT_EQ(details.details_size(), 1);
    EXPECT_TRUE(details.details(0).Is<google::rpc::RetryInfo>());
  };
  std::thread first(come);
  std::thread second(come);
  EXPECT_TRUE(WaitUntil([&] { return n_refused == 1; }));
  EXPECT_EQ(rejections(), before + 1);
  is_released_ = true;
  first.join();
  second.join();
  running.join();
  EXPECT_EQ(n_refused, 1);
}

// -- Unary answers have to fit a message

TEST_F(GenerationServiceTest, AnswerThatMayOutgrowAMessageIsRefusedBeforeItIsMade) {
  LetRequestsBeEndless();
  Serve();
  v1::GenerateRequest request = Request("x", 30000);
  request.mutable_sampling()->set_logprobs(true);
  request.mutable_sampling()->set_top_logprobs(20);
  const absl::Status refused = Generate(request).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("max_tokens")));
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4194304")));
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("30000 tokens")));
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("streaming")));
  EXPECT_EQ(Stats().steps, 0u);
  request.mutable_sampling()->set_max_tokens(5000);  // fits
  EXPECT_OK(Generate(request));
}

// Steps of a known duration, each begun when the test says so.
class StreamIntervalTest : public GenerationServiceTest {
 protected:
  static constexpr int kTokens = 6;
  void ServeWithSteps(absl::Duration step) {
    clock_ = &manual_clock_;
    service_options_.stream_interval = absl::Milliseconds(8);
    behaviour_.before_forward = [this, step](const engine::LoadedModel::Batch&) {
      EXPECT_TRUE(WaitUntil([this] { return n_permits_ > 0; }));
      --n_permits_;
      manual_clock_.Advance(step);
      return absl::OkStatus();
    };
    Serve();
  }
  // Of each message; with `waits_for_each` a step begins when the client has read all before it.
  std::vector<int> TokensByMessage(bool waits_for_each) {
    grpc::ClientContext context;
    const auto reader = stub_->GenerateStream(&context, Request("x", kTokens));
    n_permits_ = waits_for_each ? 1 : kTokens;
    std::vector<int> n_tokens;
    for (GenerateStreamResponse message; reader->Read(&message);) {
      if (!message.has_delta()) continue;
      n_tokens.push_back(message.delta().token_ids_size());
      if (waits_for_each) ++n_permits_;
    }
    EXPECT_OK(FromGrpcStatus(reader->Finish()));
    return n_tokens;
  }

  std::atomic<int> n_permits_ = 0;
};

TEST_F(StreamIntervalTest, SlowTokensAreSentAtOnce) {
  ServeWithSteps(absl::Milliseconds(9));
  EXPECT_THAT(TokensByMessage(/*waits_for_each=*/true), ElementsAre(1, 1, 1, 1, 1, 1));
}

// Nothing is sent before 8 ms are over, and what a write in flight gathered goes with it.
TEST_F(StreamIntervalTest, FastTokensShareAMessage) {
  ServeWithSteps(absl::Milliseconds(3));
  const std::vector<int> n_tokens = TokensByMessage(/*waits_for_each=*/false);
  EXPECT_EQ(std::accumulate(n_tokens.begin(), n_tokens.end(), 0), kTokens);
  EXPECT_LE(n_tokens.size(), 3u);
}

TEST_F(StreamIntervalTest, TheFirstTokenNeverWaits) {
  ServeWithSteps(absl::ZeroDuration());
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, Request("x", kTokens));
  n_permits_ = 1;
  GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_TRUE(message.has_started());
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.delta().token_ids_size(), 1);
  n_permits_ = kTokens;
  int n_rest = 0;
  while (reader->Read(&message)) n_rest += message.delta().token_ids_size();
  EXPECT_EQ(n_rest, kTokens - 1);
  EXPECT_OK(FromGrpcStatus(reader->Finish()));
}

// A worker's clock in the test's hands: deadlines pass for the engine while gRPC's are far away.
class DeadlineTest : public GenerationServiceTest {
 protected:
  // Lets so much time pass before the given step of the model.
  void PassBeforeStep(int step, absl::Duration duration) {
    clock_ = &manual_clock_;
    behaviour_.before_forward = [this, step, duration](const engine::LoadedModel::Batch&) {
      if (++n_steps_ == step) manual_clock_.Advance(duration);
      return absl::OkStatus();
    };
    Serve();
  }
  absl::StatusOr<v1::GenerateResponse> GenerateWithin(absl::Duration timeout) {
    grpc::ClientContext context;
    if (timeout != absl::InfiniteDuration()) {
      context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    }
    v1::GenerateResponse response;
    const absl::Status status =
        FromGrpcStatus(stub_->Generate(&context, Request("x", 100), &response));
    if (!status.ok()) return status;
    return response;
  }

  std::atomic<int> n_steps_ = 0;
};

TEST_F(DeadlineTest, ReturnsWhatThereIs) {
  PassBeforeStep(5, absl::Minutes(25));
  ASSERT_OK_AND_ASSIGN(const auto response, GenerateWithin(absl::Minutes(20)));
  EXPECT_EQ(response.finish_reason(), v1::DEADLINE);
  EXPECT_EQ(response.usage().completion_tokens(), 5);
  EXPECT_EQ(response.usage().completion_tokens(), response.token_ids_size());
}

TEST_F(DeadlineTest, MayBeLongerThanTheDefault) {
  PassBeforeStep(5, absl::Minutes(20));
  ASSERT_OK_AND_ASSIGN(const auto response, GenerateWithin(absl::Minutes(30)));
  EXPECT_EQ(response.finish_reason(), v1::LENGTH);
}

TEST_F(DeadlineTest, IsNeverLongerThanTheLimit) {
  PassBeforeStep(5, absl::Seconds(limits::kGenerateSecondsMax));
  ASSERT_OK_AND_ASSIGN(const auto response, GenerateWithin(absl::Hours(5)));
  EXPECT_EQ(response.finish_reason(), v1::DEADLINE);
}

TEST_F(DeadlineTest, ThereIsOneWithoutOne) {
  PassBeforeStep(5, absl::Seconds(limits::kGenerateSecondsDefault));
  ASSERT_OK_AND_ASSIGN(const auto response, GenerateWithin(absl::InfiniteDuration()));
  EXPECT_EQ(response.finish_reason(), v1::DEADLINE);
}

// The worker's own answer: gRPC's deadline is far away.
TEST_F(DeadlineTest, BeforeTheFirstTokenIsAnError) {
  Brake brake;
  clock_ = &manual_clock_;
  behaviour_.before_forward = brake.Hook();
  engine_options_.max_sequences = 1;
  Serve();
  std::thread running([this] {
    const auto response = GenerateWithin(absl::Minutes(50));
    EXPECT_OK(response);
  });
  EXPECT_TRUE(WaitUntil([this] { return Stats().running == 1; }));
  std::thread waiting_unary([this] {
    EXPECT_THAT(GenerateWithin(absl::Minutes(20)).status(),
                StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("before the first token")));
  });
  std::thread waiting_stream([this] {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(20)));
    const auto reader = stub_->GenerateStream(&context, Request("x", 100));
    GenerateStreamResponse message;
    EXPECT_FALSE(reader->Read(&message));
    EXPECT_THAT(FromGrpcStatus(reader->Finish()),
                StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("before the first token")));
  });
  EXPECT_TRUE(WaitUntil([this] { return Stats().waiting == 2; }));
  manual_clock_.Advance(absl::Minutes(25));
  brake.Release();
  running.join();
  waiting_unary.join();
  waiting_stream.join();
  WaitUntilIdle();
}

TEST_F(GenerationServiceTest, WhatAnUnloadEndsIsToldWhy) {
  Brake brake;
  behaviour_.before_forward = brake.Hook();
  LetRequestsBeEndless();
  drain_timeout_ = absl::ZeroDuration();
  Serve();
  std::thread running([this] {
    const absl::Status status = Generate(Request("x", kEndless)).status();
    EXPECT_THAT(status, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(status), "MODEL_UNLOADING");
  });
  EXPECT_TRUE(WaitUntil([this] { return Stats().running > 0; }));
  std::thread unload([this] { EXPECT_OK(store_->Unload("m")); });
  EXPECT_TRUE(WaitUntil([this] { return store_->Get("m")->state() == v1::Model::DRAINING; }));
  brake.Release();
  running.join();
  unload.join();
}

TEST_F(GenerationServiceTest, WhatAStopEndsIsToldWhy) {
  Brake brake;
  behaviour_.before_forward = brake.Hook();
  LetRequestsBeEndless();
  Serve();
  std::thread running([this] {
    const absl::Status status = Generate(Request("x", kEndless)).status();
    EXPECT_THAT(status, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(status), "WORKER_STOPPING");
  });
  EXPECT_TRUE(WaitUntil([this] { return Stats().running > 0; }));
  std::thread stop([this] { store_->DrainAll(absl::ZeroDuration()); });
  EXPECT_TRUE(WaitUntil([this] { return store_->Get("m")->state() == v1::Model::DRAINING; }));
  brake.Release();
  running.join();
  stop.join();
}

TEST_F(GenerationServiceTest, StepErrorEndsTheStreamWithItsStatus) {
  std::atomic<int> n_steps = 0;
  behaviour_.before_forward = [&](const engine::LoadedModel::Batch&) {
    return ++n_steps == 5 ? absl::DataLossError("bad weights") : absl::OkStatus();
  };
  Serve();
  const Streamed streamed = Stream(Request("x", 20));
  EXPECT_THAT(streamed.status, StatusIs(absl::StatusCode::kInternal, HasSubstr("bad weights")));
  EXPECT_EQ(streamed.tokens.size(), 4u);
  EXPECT_FALSE(streamed.messages.back().has_finished());
  EXPECT_OK(Stream(Request("x", 3)).status);
}

TEST_F(GenerationServiceTest, RequestsWhoseTextGivesNoTokensAreCounted) {
  behaviour_.chat_template = "";
  Serve();
  const auto rejections = [] {
    return testing::MetricValue("walsh_admission_rejections_total",
                                {"model_name=\"m\"", "reason=\"invalid\""});
  };
  const double before = rejections();
  v1::ChatRequest request;
  request.set_model("m");
  request.add_messages()->set_role("user");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  EXPECT_THAT(FromGrpcStatus(stub_->Chat(&context, request, &response)),
              HasCode(absl::StatusCode::kUnimplemented));
  EXPECT_EQ(rejections(), before + 1);
}

TEST_F(GenerationServiceTest, EveryRequestLeavesOneLineInTheLog) {
  Serve();
  v1::GenerateRequest request = Request("x", 3);
  request.set_request_id("id-of-a-unary-call");
  ::testing::internal::CaptureStderr();
  EXPECT_OK(Generate(request));
  request.set_request_id("id-of-a-stream");
  EXPECT_OK(Stream(request).status);
  request.set_request_id("id-of-a-refusal");
  request.set_model("models/nobody");
  EXPECT_FALSE(Generate(request).ok());
  const std::string log = ::testing::internal::GetCapturedStderr();
  const std::vector<std::string> lines = absl::StrSplit(log, '\n');
  for (const char* id : {"id-of-a-unary-call", "id-of-a-stream"}) {
    const auto is_of_it = [id](const std::string& line) {
      return line.find(id) != std::string::npos;
    };
    ASSERT_EQ(std::count_if(lines.begin(), lines.end(), is_of_it), 1) << log;
    const std::string& line = *std::find_if(lines.begin(), lines.end(), is_of_it);
    EXPECT_THAT(line, HasSubstr("models/m"));
    EXPECT_THAT(line, HasSubstr("finish_reason=length"));
    EXPECT_THAT(line, HasSubstr("completion_tokens=3"));
    EXPECT_THAT(line, HasSubstr("seconds="));
  }
  EXPECT_THAT(log, HasSubstr("id-of-a-refusal"));
}

TEST_F(GenerationServiceTest, StalledReaderLosesItsStreamAndOthersGoOn) {
  behaviour_.max_position = 8192;
  service_options_.stall_limit = absl::Seconds(1);
  Serve();
  grpc::ChannelArguments arguments;
  // As little as possible is read ahead of the application.
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  const auto slow_stub = v1::GenerationService::NewStub(
      grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments));
  v1::GenerateRequest request = Request("x", 4000);
  request.mutable_sampling()->set_logprobs(true);
  request.mutable_sampling()->set_top_logprobs(20);
  grpc::ClientContext context;
  const auto reader = slow_stub->GenerateStream(&context, request);
  GenerateStreamResponse message;
  ASSERT_TRUE(reader->Read(&message));
  WaitUntilIdle();
  EXPECT_OK(Stream(Request("y", 20)).status);
  while (reader->Read(&message)) {
    Pause(service_options_.stall_limit * 2);
  }
  EXPECT_THAT(FromGrpcStatus(reader->Finish()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("reader")));
}

TEST_F(GenerationServiceTest, UnloadWaitsForRunningRequests) {
  Brake brake;
  behaviour_.before_forward = brake.Hook();
  Serve();
  std::thread running([this] { EXPECT_OK(Generate(Request("x", 5))); });
  EXPECT_TRUE(WaitUntil([this] { return Stats().running > 0; }));
  std::thread unload([this] { EXPECT_OK(store_->Unload("m")); });
  EXPECT_TRUE(WaitUntil([this] { return store_->Get("m")->state() == v1::Model::DRAINING; }));
  const absl::Status status = Generate(Request("y", 1)).status();
  EXPECT_THAT(status, HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(ErrorReason(status), "MODEL_UNLOADING");
  brake.Release();
  running.join();
  unload.join();
  EXPECT_EQ(store_->Get("m")->state(), v1::Model::UNLOADED);
}

TEST_F(GenerationServiceTest, ManyClientsAtOnceGetTheirOwnAnswers) {
  engine_options_.max_waiting = 100;
  Serve();
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([this, i] {
      for (int n = 0; n < 10; ++n) {
        const v1::GenerateRequest request =
            Request("client " + std::to_string(i) + "/" + std::to_string(n), 20);
        const auto unary = Generate(request);
        ASSERT_OK(unary);
        const Streamed streamed = Stream(request);
        ASSERT_OK(streamed.status);
        ASSERT_EQ(streamed.text, unary->text());
      }
    });
  }
  for (std::thread& client : clients) client.join();
  WaitUntilIdle();
}

}  // namespace
}  // namespace walsh::service
