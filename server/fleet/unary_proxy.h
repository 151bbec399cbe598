// Carries one unary call from a client to a worker and its answer back.
//
// The client's cancellation and deadline reach the worker; no thread is held.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>
#include <utility>

#include "absl/time/time.h"
#include "common/grpc_cancellation.h"
#include "common/grpc_status.h"
#include "server/fleet/forwarded_calls.h"
#include "server/fleet/worker_client.h"

namespace walsh::fleet {

// Deletes itself when gRPC is done with the client's call.
class UnaryProxy : public grpc::ServerUnaryReactor {
 public:
  // Starts the worker's call; `done` must be called with its status.
  using Start = std::function<void(grpc::ClientContext*, std::function<void(grpc::Status)> done)>;

  // Returns the reactor of the client's call. `go_elsewhere` gets what a worker's call failed with,
  // and tells whether `start` shall be called again, for another worker. `done` runs once, when the
  // last worker's call has ended, with the status that the client gets.
  static grpc::ServerUnaryReactor* Run(ForwardedCalls* calls, absl::Duration timeout, Start start,
                                       std::function<bool(const absl::Status&)> go_elsewhere,
                                       std::function<void(const absl::Status&)> done) {
    auto* proxy =
        new UnaryProxy(calls, timeout, std::move(start), std::move(go_elsewhere), std::move(done));
    proxy->StartCall();
    return proxy;
  }

  void OnCancel() override { cancellation_.Cancel(); }
  // Comes after Finish, which comes after the end of the worker's call.
  void OnDone() override { delete this; }

 private:
  struct WorkerCall {
    WorkerCall(Cancellation* cancellation, ForwardedCalls* calls)
        : cancellable(cancellation, &context), counted(calls, &context) {}
    grpc::ClientContext context;
    const Cancellation::Call cancellable;
    const ForwardedCalls::Call counted;
  };

  UnaryProxy(ForwardedCalls* calls, absl::Duration timeout, Start start,
             std::function<bool(const absl::Status&)> go_elsewhere,
             std::function<void(const absl::Status&)> done)
      : calls_(calls),
        deadline_(absl::Now() + timeout),
        start_(std::move(start)),
        go_elsewhere_(std::move(go_elsewhere)),
        done_(std::move(done)) {}

  void StartCall() {
    call_ = std::make_unique<WorkerCall>(&cancellation_, calls_);
    call_->context.set_deadline(absl::ToChronoTime(deadline_));
    const Start start = start_;  // this object may go while it runs
    start(&call_->context, [this](const grpc::Status& status) {
      OnWorkerDone(calls_->Meaning(FromWorker(status)));
    });
  }

  void OnWorkerDone(const absl::Status& ended) {
    call_.reset();
    if (!ended.ok() && !cancellation_.cancelled() && go_elsewhere_(ended)) return StartCall();
    done_(ended);
    Finish(ToGrpcStatus(ended));
  }

  ForwardedCalls* const calls_;
  const absl::Time deadline_;
  const Start start_;
  const std::function<bool(const absl::Status&)> go_elsewhere_;
  const std::function<void(const absl::Status&)> done_;
  Cancellation cancellation_;
  std::unique_ptr<WorkerCall> call_;  // that runs
};

}  // namespace walsh::fleet
