#include "worker/service/generation_call.h"

#include <grpc/grpc.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "worker/engine/engine_metrics.h"
#include "worker/service/generation_conversion.h"

namespace walsh::service {
namespace {

void Cancel(const CallInfo& info) {
  if (const auto engine = info.engine.lock()) engine->Cancel(info.engine_id);
}

void FailRequest(const CallInfo& info, const absl::Status& why) {
  if (const auto engine = info.engine.lock()) engine->Fail(info.engine_id, why);
}

double SecondsSinceArrival(const CallInfo& info) {
  return absl::ToDoubleSeconds(info.clock->Monotonic() - info.arrival);
}

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

void LogFinished(const CallInfo& info, const engine::Outcome& outcome) {
  WALSH_LOG(Info, "request ended", {"request_id", info.request_id}, {"model", info.model},
            {"finish_reason", engine::FinishReasonName(outcome.reason)},
            {"prompt_tokens", outcome.prompt_tokens},
            {"completion_tokens", outcome.completion_tokens},
            {"seconds", SecondsSinceArrival(info)});
}

void LogFailed(const CallInfo& info, const absl::Status& status) {
  WALSH_LOG(Info, "request failed", {"request_id", info.request_id}, {"model", info.model},
            {"prompt_tokens", info.prompt_tokens}, {"error", status},
            {"seconds", SecondsSinceArrival(info)});
}

// -- Unary --------------------------------------------------------------------------------------

class UnaryCall::Reactor final : public grpc::ServerUnaryReactor {
 public:
  explicit Reactor(CallInfo info) : info_(std::move(info)) {}
  void OnCancel() override { Cancel(info_); }
  void OnDone() override { delete this; }

 private:
  const CallInfo info_;
};

std::shared_ptr<UnaryCall> UnaryCall::Start(CallInfo info, v1::GenerateResponse* response) {
  std::shared_ptr<UnaryCall> call(new UnaryCall(std::move(info), response));
  call->reactor_ = new Reactor(call->info_);
  return call;
}

void UnaryCall::Fail(const absl::Status& status) {
  LogFailed(info_, status);
  End(status);
}

void UnaryCall::End(const absl::Status& status) { reactor_->Finish(ToGrpcStatus(status)); }

void UnaryCall::OnStarted(double) {
  response_->set_request_id(info_.request_id);
  response_->set_model(info_.model);
  response_->set_seed(info_.seed);
}

void UnaryCall::OnDelta(engine::Delta delta) {
  v1::GenerateStreamResponse::Delta part = ToProto(std::move(delta), *info_.tokenizer);
  response_->mutable_text()->append(part.text());
  response_->mutable_token_ids()->MergeFrom(part.token_ids());
  response_->mutable_logprobs()->MergeFrom(part.logprobs());
}

void UnaryCall::OnFinished(const engine::Outcome& outcome) {
  LogFinished(info_, outcome);
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
  void OnCancel() override { Cancel(call_->info_); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<StreamCall> call_;
};

std::shared_ptr<StreamCall> StreamCall::Start(CallInfo info, grpc::CallbackServerContext* context) {
  std::shared_ptr<StreamCall> call(new StreamCall(std::move(info), context));
  call->reactor_ = new Reactor(call);
  return call;
}

void StreamCall::Fail(const absl::Status& status) {
  LogFailed(info_, status);
  End(status);
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
  started.set_prompt_tokens(info_.prompt_tokens);
  started.set_queue_seconds(queue_seconds);
  started.set_seed(info_.seed);
  Push(std::move(message));
}

void StreamCall::OnDelta(engine::Delta delta) {
  v1::GenerateStreamResponse message;
  *message.mutable_delta() = ToProto(std::move(delta), *info_.tokenizer);
  Push(std::move(message));
}

void StreamCall::OnFinished(const engine::Outcome& outcome) {
  LogFinished(info_, outcome);
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

void StreamCall::Push(v1::GenerateStreamResponse message) {
  absl::Status full;
  {
    const std::lock_guard lock(mu_);
    if (end_) return;
    if (!queue_.Push(std::move(message))) {
      full = absl::ResourceExhaustedError("the stream's reader is too slow: its queue is full");
      queue_.Clear();
      end_ = full;
    }
  }
  if (!full.ok()) FailRequest(info_, full);
  Pump();
}

void StreamCall::Pump() {
  std::optional<absl::Status> end;
  {
    const std::lock_guard lock(mu_);
    if (is_writing_ || is_pinned_ || is_finished_) return;
    if (!queue_.empty()) {
      writing_ = queue_.Pop();
      is_writing_ = true;
      write_start_ = info_.clock->Monotonic();
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
  if (!ok) Cancel(info_);
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
  FailRequest(info_, status);
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
