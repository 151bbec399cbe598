#include "worker/service/generation_call.h"

#include <grpc/grpc.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "worker/engine/engine_metrics.h"
#include "worker/service/generation_conversion.h"

namespace walsh::service {
namespace {

// Of a unary answer beside its text, tokens and log-probabilities: names and figures.
constexpr int64_t kAnswerFrameBytesMax = 4 << 10;

}  // namespace

absl::Status EndStatus(const engine::Outcome& outcome) {
  if (outcome.reason == engine::FinishReason::kCancelled) {
    return absl::CancelledError("the request was cancelled");
  }
  if (outcome.reason == engine::FinishReason::kDeadline && outcome.completion_tokens == 0) {
    return absl::DeadlineExceededError("the deadline passed before the first token");
  }
  return absl::OkStatus();
}

// -- Both ---------------------------------------------------------------------------------------

absl::Status GenerationCall::Submit(const std::shared_ptr<engine::Engine>& engine,
                                    engine::Request request) {
  seed_ = request.sampling.seed;
  prompt_tokens_ = static_cast<int>(request.prompt.size());
  tokenizer_ = &engine->model().tokenizer();
  const std::string id = request.id;
  {
    const std::lock_guard lock(submit_mu_);
    engine_ = engine;
    engine_id_ = id;
  }
  if (absl::Status status = engine->Submit(std::move(request), shared_from_this()); !status.ok()) {
    return status;
  }
  // The engine did not know the request that a cancel before named.
  if (is_cancelled()) engine->Cancel(id);
  return absl::OkStatus();
}

std::shared_ptr<engine::Engine> GenerationCall::FindEngine() const {
  const std::lock_guard lock(submit_mu_);
  return engine_.lock();
}

void GenerationCall::Cancel() {
  {
    const std::lock_guard lock(submit_mu_);
    is_cancelled_ = true;
  }
  if (const auto engine = FindEngine()) engine->Cancel(engine_id_);
}

bool GenerationCall::is_cancelled() const {
  const std::lock_guard lock(submit_mu_);
  return is_cancelled_;
}

void GenerationCall::FailInEngine(const absl::Status& why) {
  if (const auto engine = FindEngine()) engine->Fail(engine_id_, why);
}

void GenerationCall::LogFinished(const engine::Outcome& outcome) const {
  WALSH_LOG(Info, "request ended", {"request_id", info_.request_id}, {"model", info_.model},
            {"finish_reason", engine::FinishReasonName(outcome.reason)},
            {"prompt_tokens", outcome.prompt_tokens},
            {"completion_tokens", outcome.completion_tokens},
            {"seconds", absl::ToDoubleSeconds(info_.clock->Monotonic() - info_.arrival)});
}

void GenerationCall::Fail(const absl::Status& status) {
  WALSH_LOG(Info, "request failed", {"request_id", info_.request_id}, {"model", info_.model},
            {"prompt_tokens", prompt_tokens_}, {"error", status},
            {"seconds", absl::ToDoubleSeconds(info_.clock->Monotonic() - info_.arrival)});
  End(status);
}

// -- Unary --------------------------------------------------------------------------------------

class UnaryCall::Reactor final : public grpc::ServerUnaryReactor {
 public:
  explicit Reactor(std::shared_ptr<UnaryCall> call) : call_(std::move(call)) {}
  void OnCancel() override { call_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<UnaryCall> call_;
};

std::shared_ptr<UnaryCall> UnaryCall::Start(CallInfo info, v1::GenerateResponse* response) {
  std::shared_ptr<UnaryCall> call(new UnaryCall(std::move(info), response));
  call->reactor_ = new Reactor(call);
  return call;
}

void UnaryCall::End(const absl::Status& status) { reactor_->Finish(ToGrpcStatus(status)); }

void UnaryCall::OnStarted(double) {
  response_->set_request_id(info_.request_id);
  response_->set_model(info_.model);
  response_->set_seed(seed_);
}

void UnaryCall::OnDelta(engine::Delta delta) {
  if (!overflow_.ok()) return;
  v1::GenerateStreamResponse::Delta part = ToProto(std::move(delta), *tokenizer_);
  // Each part's frame is counted though the whole has one of them: an answer that counts as small
  // enough is.
  response_bytes_ += static_cast<int64_t>(part.ByteSizeLong());
  if (response_bytes_ > limits::kMessageBytesMax - kAnswerFrameBytesMax) {
    overflow_ = absl::ResourceExhaustedError(absl::StrCat(
        "the answer outgrew the ", limits::kMessageBytesMax, " bytes of a message after ",
        response_->token_ids_size(), " tokens; use the streaming call"));
    return FailInEngine(overflow_);
  }
  response_->mutable_text()->append(part.text());
  response_->mutable_token_ids()->MergeFrom(part.token_ids());
  response_->mutable_logprobs()->MergeFrom(part.logprobs());
}

void UnaryCall::OnFinished(const engine::Outcome& outcome) {
  if (!overflow_.ok()) return Fail(overflow_);
  LogFinished(outcome);
  if (const absl::Status status = EndStatus(outcome); !status.ok()) return End(status);
  response_->set_finish_reason(ToProto(outcome.reason));
  response_->set_stop_sequence(outcome.matched_stop);
  *response_->mutable_usage() = ToUsage(outcome);
  *response_->mutable_timings() = ToTimings(outcome);
  End(absl::OkStatus());
}

// -- Stream -------------------------------------------------------------------------------------

class StreamCall::Reactor final : public grpc::ServerWriteReactor<v1::GenerateStreamResponse> {
 public:
  explicit Reactor(std::shared_ptr<StreamCall> call) : call_(std::move(call)) {}
  void OnWriteDone(bool ok) override { call_->OnWriteDone(ok); }
  void OnCancel() override { call_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<StreamCall> call_;
};

std::shared_ptr<StreamCall> StreamCall::Start(CallInfo info, grpc::CallbackServerContext* context,
                                              absl::Duration interval) {
  std::shared_ptr<StreamCall> call(new StreamCall(std::move(info), context, interval));
  call->reactor_ = new Reactor(call);
  return call;
}

void StreamCall::End(const absl::Status& status) {
  {
    const std::lock_guard lock(mu_);
    if (!end_) end_ = status;
  }
  Pump();
}

void StreamCall::OnStarted(double queue_seconds) {
  v1::GenerateStreamResponse message;
  v1::GenerateStreamResponse::Started& started = *message.mutable_started();
  started.set_request_id(info_.request_id);
  started.set_model(info_.model);
  started.set_prompt_tokens(prompt_tokens_);
  started.set_queue_seconds(queue_seconds);
  started.set_seed(seed_);
  Push(std::move(message));
}

// Each message wakes threads of both ends. Where tokens come faster than they can be seen, that
// costs more of a small machine than all else around the engine.
void StreamCall::OnDelta(engine::Delta delta) {
  const bool may_wait = delta.next_in < interval_;
  v1::GenerateStreamResponse message;
  *message.mutable_delta() = ToProto(std::move(delta), *tokenizer_);
  Push(std::move(message), may_wait);
}

void StreamCall::OnFinished(const engine::Outcome& outcome) {
  LogFinished(outcome);
  const absl::Status status = EndStatus(outcome);
  if (status.ok()) {
    v1::GenerateStreamResponse message;
    v1::GenerateStreamResponse::Finished& finished = *message.mutable_finished();
    finished.set_finish_reason(ToProto(outcome.reason));
    finished.set_stop_sequence(outcome.matched_stop);
    *finished.mutable_usage() = ToUsage(outcome);
    *finished.mutable_timings() = ToTimings(outcome);
    Push(std::move(message));
  }
  End(status);
}

void StreamCall::Push(v1::GenerateStreamResponse message, bool may_wait) {
  absl::Status full;
  {
    const std::lock_guard lock(mu_);
    if (end_) return;
    may_wait = may_wait && (queue_.empty() || is_holding_) &&
               info_.clock->Monotonic() - delta_start_ < interval_;
    if (queue_.Push(std::move(message))) {
      is_holding_ = may_wait;
    } else {
      full = absl::ResourceExhaustedError("the stream's reader is too slow: its queue is full");
      queue_.Clear();
      end_ = full;
    }
  }
  if (!full.ok()) FailInEngine(full);
  Pump();
}

void StreamCall::Pump() {
  std::optional<absl::Status> end;
  {
    const std::lock_guard lock(mu_);
    if (is_writing_ || is_pinned_ || is_finished_) return;
    if (!queue_.empty()) {
      if (is_holding_ && !end_) return;
      writing_ = queue_.Pop();
      is_writing_ = true;
      is_holding_ = false;
      write_start_ = info_.clock->Monotonic();
      if (writing_.has_delta()) delta_start_ = write_start_;
    } else if (end_) {
      is_finished_ = true;
      end = end_;
    } else {
      return;
    }
  }
  // The reactor stays until Finish was called and every write is done, and by the flags above each
  // has one caller.
  if (end) {
    reactor_->Finish(ToGrpcStatus(*end));
  } else {
    reactor_->StartWrite(&writing_);
  }
}

void StreamCall::OnWriteDone(bool ok) {
  {
    const std::lock_guard lock(mu_);
    is_writing_ = false;
    if (!ok) {
      // The client is gone or the call was cancelled; nothing more can be said.
      queue_.Clear();
      if (!end_) end_ = absl::CancelledError("the client went away");
    }
  }
  if (!ok) Cancel();
  Pump();
}

void StreamCall::EndIfStalled(absl::Duration limit) {
  absl::Status status;
  {
    const std::lock_guard lock(mu_);
    if (!is_writing_ || is_finished_ || info_.clock->Monotonic() - write_start_ < limit) return;
    status = absl::ResourceExhaustedError(
        absl::StrCat("the stream's reader took nothing for ", absl::FormatDuration(limit)));
    queue_.Clear();
    end_ = status;
    is_pinned_ = true;  // keeps `context_` while it is cancelled
  }
  WALSH_LOG(Warning, "stream ended: its reader is stalled", {"request_id", info_.request_id});
  FailInEngine(status);
  // A status behind a message that is stuck in flow control would never leave, so the call is
  // reset with it.
  grpc_call_cancel_with_status(context_->c_call(), GRPC_STATUS_RESOURCE_EXHAUSTED,
                               std::string(status.message()).c_str(), nullptr);
  {
    const std::lock_guard lock(mu_);
    is_pinned_ = false;
  }
  Pump();
}

}  // namespace walsh::service
