// The order of events that a network does not let a test choose.
#include "worker/service/generation_call.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "tests/testing/fake_model.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace walsh::service {
namespace {

using walsh::testing::FakeModel;
using walsh::testing::WaitUntil;

class GenerationCallTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto engine = engine::Engine::Create(
        FakeModel::Create({.before_forward =
                               [this](const engine::LoadedModel::Batch&) {
                                 ++n_begun_;
                                 released_.wait();
                                 ++n_steps_;
                                 return absl::OkStatus();
                               }}),
        {.model_name = "call", .max_sequences = 2, .n_threads = 1}, Clock::Real());
    ASSERT_OK(engine);
    engine_ = *std::move(engine);
    call_ = UnaryCall::Start({.request_id = "r", .model = "models/call", .clock = Clock::Real()},
                             &response_);
    // gRPC's in a server, which has none here: what is said to the client goes nowhere.
    reactor_.reset(call_->reactor());
  }

  absl::Status Submit(int max_tokens) {
    engine::Request request{.id = "r#1", .prompt = {1}, .sampling = {.max_tokens = max_tokens}};
    return call_->Submit(engine_, std::move(request));
  }
  bool IsIdle() const { return engine_->stats().running + engine_->stats().waiting == 0; }
  static double Cancellations() {
    return testing::MetricValue("walsh_request_cancelled_total", {"model_name=\"call\""});
  }

  std::promise<void> release_;
  const std::shared_future<void> released_ = release_.get_future().share();
  std::atomic<int> n_begun_ = 0;
  std::atomic<int> n_steps_ = 0;
  v1::GenerateResponse response_;
  std::shared_ptr<UnaryCall> call_;
  std::unique_ptr<grpc::ServerUnaryReactor> reactor_;
  std::shared_ptr<engine::Engine> engine_;
};

TEST_F(GenerationCallTest, ACancelBeforeTheRequestIsReadyIsRemembered) {
  const double before = Cancellations();
  EXPECT_FALSE(call_->is_cancelled());
  call_->Cancel();
  EXPECT_TRUE(call_->is_cancelled());
  EXPECT_OK(Submit(200));
  release_.set_value();
  EXPECT_TRUE(WaitUntil([this] { return IsIdle(); }));
  EXPECT_LE(n_steps_, 1);
  engine_.reset();
  EXPECT_EQ(Cancellations(), before + 1);
}

TEST_F(GenerationCallTest, ACancelAfterItIsInTheEngineEndsItThere) {
  const double before = Cancellations();
  EXPECT_OK(Submit(200));
  call_->Cancel();
  call_->Cancel();
  release_.set_value();
  EXPECT_TRUE(WaitUntil([this] { return IsIdle(); }));
  EXPECT_LE(n_steps_, 1);
  engine_.reset();
  EXPECT_EQ(Cancellations(), before + 1);
}

// Of tokens longer than was reckoned with when the request was accepted.
TEST_F(GenerationCallTest, AnAnswerThatOutgrowsAMessageEndsThen) {
  const auto failures = [] {
    return testing::MetricValue("walsh_request_failure_total",
                                {"model_name=\"call\"", "code=\"RESOURCE_EXHAUSTED\""});
  };
  const double before = failures();
  EXPECT_OK(Submit(200));
  EXPECT_TRUE(WaitUntil([this] { return n_begun_ == 1; }));
  for (int i = 0; i < 6; ++i) {
    call_->OnDelta({.text = std::string(1 << 20, 'x'), .tokens = {1}});
  }
  EXPECT_EQ(response_.token_ids_size(), 3);
  release_.set_value();
  EXPECT_TRUE(WaitUntil([this] { return IsIdle(); }));
  EXPECT_LE(n_steps_, 1);
  engine_.reset();
  EXPECT_EQ(failures(), before + 1);
}

TEST_F(GenerationCallTest, ACancelAfterTheEngineIsGoneIsNothing) {
  release_.set_value();
  EXPECT_OK(Submit(2));
  EXPECT_TRUE(WaitUntil([this] { return IsIdle(); }));
  engine_.reset();
  call_->Cancel();
  EXPECT_EQ(response_.token_ids_size(), 2);
}

}  // namespace
}  // namespace walsh::service
