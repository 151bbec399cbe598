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
#include "common/grpc_status.h"
#include "server/fleet/worker_client.h"

namespace walsh::fleet {

// Deletes itself when gRPC is done with the client's call.
class UnaryProxy : public grpc::ServerUnaryReactor {
 public:
  // Starts the worker's call; `done` must be called with its status.
  using Start = std::function<void(grpc::ClientContext*, std::function<void(grpc::Status)> done)>;

  // Returns the reactor of the client's call. `done` runs once, when the worker's call has ended,
  // with the status that the client gets.
  static grpc::ServerUnaryReactor* Run(absl::Duration timeout, const Start& start,
                                       std::function<void(const absl::Status&)> done) {
    auto* proxy = new UnaryProxy;
    proxy->client_context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    start(&proxy->client_context_, [proxy, done = std::move(done)](const grpc::Status& status) {
      const absl::Status ended = FromWorker(status);
      done(ended);
      proxy->Finish(ToGrpcStatus(ended));
    });
    return proxy;
  }

  void OnCancel() override { client_context_.TryCancel(); }
  // Comes after Finish, which comes after the end of the worker's call.
  void OnDone() override { delete this; }

 private:
  UnaryProxy() = default;
  grpc::ClientContext client_context_;
};

}  // namespace walsh::fleet
