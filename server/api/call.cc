#include "server/api/call.h"

#include <grpc/grpc.h>
#include <grpcpp/alarm.h>

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "server/fleet/forwarding.h"

namespace walsh::api {
namespace {

constexpr char kRequestIdKey[] = "x-request-id";

bool IsRequestId(const std::string& id) {
  return !id.empty() && id.size() <= limits::kRequestIdBytesMax &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > 0x20 && c < 0x7f; });
}

std::string DrawRequestId() {
  thread_local absl::BitGen random;
  return absl::StrCat("req-", absl::Hex(absl::Uniform<uint64_t>(random), absl::kZeroPad16));
}

// Deletes itself when gRPC is done with the call.
class Reactor : public grpc::ServerUnaryReactor {
 public:
  explicit Reactor(std::shared_ptr<Cancellation> cancellation)
      : cancellation_(std::move(cancellation)) {}

  // Does what gRPC does when a deadline has passed. To call Finish instead would take the messages
  // away from a handler that works on them.
  void EndAfter(absl::Duration timeout, grpc_call* call) {
    grpc_call_ref(call);
    timer_.Set(absl::ToChronoTime(absl::Now() + timeout), [call, timeout](bool has_passed) {
      if (has_passed) {
        const std::string why = absl::StrCat("took longer than the ", absl::FormatDuration(timeout),
                                             " that a call without a deadline has");
        grpc_call_cancel_with_status(call, GRPC_STATUS_DEADLINE_EXCEEDED, why.c_str(), nullptr);
      }
      grpc_call_unref(call);
    });
  }

  void OnCancel() override { cancellation_->Cancel(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<Cancellation> cancellation_;
  grpc::Alarm timer_;  // not the executor's, which waits for the store, too
};

}  // namespace

absl::Status Overloaded(absl::StatusCode code) {
  absl::Status status(code, "too many calls wait for the coordinator");
  SetErrorInfo(status, "OVERLOADED");
  SetRetryDelay(status, absl::Seconds(1));
  return status;
}

absl::Status Stopping() {
  absl::Status status = absl::UnavailableError("the coordinator stops");
  SetErrorInfo(status, "STOPPING");
  SetRetryDelay(status, absl::Seconds(1));
  return status;
}

std::string EchoRequestId(grpc::CallbackServerContext* context) {
  std::string id;
  const auto it = context->client_metadata().find(kRequestIdKey);
  if (it != context->client_metadata().end()) id.assign(it->second.data(), it->second.size());
  if (!IsRequestId(id)) id = DrawRequestId();
  context->AddInitialMetadata(kRequestIdKey, id);
  return id;
}

void LogEnd(const char* method, const std::string& request_id, const absl::Status& status) {
  const bool is_ours = absl::IsInternal(status) || absl::IsDataLoss(status);
  if (is_ours) {
    WALSH_LOG(Error, "call failed", {"method", method}, {"request_id", request_id},
              {"status", status});
  } else {
    WALSH_LOG(Debug, "call ended", {"method", method}, {"request_id", request_id},
              {"status", status});
  }
}

Call::Call(grpc::CallbackServerContext* context, const char* method, absl::Duration timeout_default)
    : method_(method),
      cancellation_(std::make_shared<Cancellation>()),
      request_id_(EchoRequestId(context)) {
  auto reactor = std::make_unique<Reactor>(cancellation_);
  if (!fleet::HasDeadline(context->deadline()) && timeout_default != absl::InfiniteDuration()) {
    reactor->EndAfter(timeout_default, context->c_call());
  }
  reactor_ = reactor.release();
}

void Call::Finish(const absl::Status& status) const {
  LogEnd(method_, request_id_, status);
  reactor_->Finish(ToGrpcStatus(status));
}

grpc::ServerUnaryReactor* Call::FinishNow(const absl::Status& status) const {
  Finish(status);
  return reactor_;
}

grpc::ServerUnaryReactor* Call::Run(Executor* executor, std::function<absl::Status()> body) const {
  return RunAsync(executor, [call = *this, body = std::move(body)] { call.Finish(body()); });
}

grpc::ServerUnaryReactor* Call::RunAsync(Executor* executor, std::function<void()> body) const {
  if (!executor->Post(std::move(body))) return FinishNow(Overloaded());
  return reactor_;
}

}  // namespace walsh::api
