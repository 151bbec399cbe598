// One request's events on record, with their order checked.
//
// Threads: the events are the engine's; the rest may be called from any thread, the results after
//          the end only.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "worker/engine/engine.h"

namespace walsh::testing {

class RecordingSink final : public engine::Sink {
 public:
  void OnStarted(double) override {
    const std::lock_guard lock(mu_);
    EXPECT_FALSE(is_started_ || is_over_);
    is_started_ = true;
  }
  void OnDelta(engine::Delta delta) override {
    const std::lock_guard lock(mu_);
    EXPECT_TRUE(is_started_);
    EXPECT_FALSE(is_over_);
    text_ += delta.text;
    tokens_.insert(tokens_.end(), delta.tokens.begin(), delta.tokens.end());
    logprobs_.insert(logprobs_.end(), delta.logprobs.begin(), delta.logprobs.end());
    next_in_.push_back(delta.next_in);
    changed_.notify_all();
  }
  void OnFinished(const engine::Outcome& outcome) override { End(absl::OkStatus(), outcome); }
  void OnFailed(const absl::Status& status) override { End(status, {}); }

  void WaitForEnd() {
    std::unique_lock lock(mu_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [this] { return is_over_; }));
  }
  void WaitForTokens(size_t n) {
    std::unique_lock lock(mu_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60),
                                  [&] { return tokens_.size() >= n || is_over_; }));
  }
  // After the end only.
  const std::string& text() const { return text_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<engine::TokenLogprob>& logprobs() const { return logprobs_; }
  const std::vector<absl::Duration>& next_in() const { return next_in_; }  // by delta
  const engine::Outcome& outcome() const { return outcome_; }
  const absl::Status& status() const { return status_; }
  bool is_over() {
    const std::lock_guard lock(mu_);
    return is_over_;
  }

 private:
  void End(const absl::Status& status, const engine::Outcome& outcome) {
    const std::lock_guard lock(mu_);
    EXPECT_FALSE(is_over_) << "ended twice";
    is_over_ = true;
    status_ = status;
    outcome_ = outcome;
    changed_.notify_all();
  }

  std::mutex mu_;
  std::condition_variable changed_;
  bool is_started_ = false;
  bool is_over_ = false;
  std::string text_;
  std::vector<int32_t> tokens_;
  std::vector<engine::TokenLogprob> logprobs_;
  std::vector<absl::Duration> next_in_;
  engine::Outcome outcome_;
  absl::Status status_;
};

}  // namespace walsh::testing
