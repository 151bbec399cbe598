// What every handler does around its work: the request id, the executor, the status, the log.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/executor.h"
#include "common/grpc_cancellation.h"
#include "common/grpc_status.h"

namespace walsh::api {

// One unary call. Created first in a handler; echoes x-request-id.
class Call {
 public:
  // `method` is a literal, for logs. A client that named no deadline gets DEADLINE_EXCEEDED after
  // `timeout_default`, as the others do after theirs: the handler goes on, and its Finish is not
  // heard.
  Call(grpc::CallbackServerContext* context, const char* method,
       absl::Duration timeout_default = absl::InfiniteDuration());

  // The client's x-request-id when it is fit to print, else one drawn here.
  const std::string& request_id() const { return request_id_; }
  grpc::ServerUnaryReactor* reactor() const { return reactor_; }
  // Cancelled when the client has gone, when its deadline has passed and when the server stops:
  // for the calls that this one makes to workers.
  const std::shared_ptr<Cancellation>& cancellation() const { return cancellation_; }

  // Exactly once, from any thread.
  void Finish(const absl::Status& status) const;
  // Runs `body` on the executor and finishes with its status; RESOURCE_EXHAUSTED when too much
  // waits.
  grpc::ServerUnaryReactor* Run(Executor* executor, std::function<absl::Status()> body) const;
  // Runs `body` on the executor; it finishes the call, now or later.
  grpc::ServerUnaryReactor* RunAsync(Executor* executor, std::function<void()> body) const;
  grpc::ServerUnaryReactor* FinishNow(const absl::Status& status) const;

 private:
  const char* method_;
  std::shared_ptr<Cancellation> cancellation_;
  grpc::ServerUnaryReactor* reactor_;  // gRPC's, until Finish
  std::string request_id_;
};

// What refuses a call before its work began; RetryInfo. RESOURCE_EXHAUSTED (OVERLOADED) because too
// much waits; UNAVAILABLE for calls that their callers make again by themselves.
absl::Status Overloaded(absl::StatusCode code = absl::StatusCode::kResourceExhausted);
// UNAVAILABLE (STOPPING), with RetryInfo: the coordinator stops, and may come back.
absl::Status Stopping();

// A stream that ends before it began.
template <typename Response>
class FailedStream : public grpc::ServerWriteReactor<Response> {
 public:
  explicit FailedStream(const absl::Status& status) { this->Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

// Adds x-request-id to the answer's initial metadata and returns it.
std::string EchoRequestId(grpc::CallbackServerContext* context);
void LogEnd(const char* method, const std::string& request_id, const absl::Status& status);

}  // namespace walsh::api
