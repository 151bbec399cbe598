// walsh.v1.GenerationService on a worker: from a request to the engine of its model.
//
// Validated again here, since the port may be reached by others than the coordinator. Handlers only
// turn text into tokens and submit; they never wait for the model.
//
// Errors:  INVALID_ARGUMENT    a field, or with reason CONTEXT_LENGTH_EXCEEDED a prompt too long
//          RESOURCE_EXHAUSTED  the model's queue is full (with a retry delay), a stalled reader
//          others              as ModelStore::FindEngine, ChatTokens and Engine::Submit give them
// Threads: gRPC's callback threads
#pragma once

#include <grpcpp/server_context.h>

#include <atomic>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/limits.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "worker/service/model_store.h"
#include "worker/service/stall_monitor.h"

namespace walsh::service {

class GenerationService final : public v1::GenerationService::CallbackService {
 public:
  GenerationService(ModelStore* models, Clock* clock,
                    absl::Duration stall_limit = absl::Seconds(limits::kStreamStallSecondsMax));

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override;
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context,
                                 const v1::ChatRequest* request,
                                 v1::GenerateResponse* response) override;
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* ChatStream(
      grpc::CallbackServerContext* context, const v1::ChatRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;

 private:
  // A request in the engine's terms, and the call's.
  struct Prepared {
    std::shared_ptr<engine::Engine> engine;
    engine::Request request;
    CallInfo info;
  };
  // What is known of a request before it is looked at.
  template <typename Request>
  CallInfo Arrive(const grpc::CallbackServerContext& context, const Request& request) const;
  template <typename Request>
  absl::StatusOr<Prepared> Prepare(grpc::CallbackServerContext* context, const Request& request,
                                   CallInfo info);
  template <typename Request>
  grpc::ServerUnaryReactor* RunUnary(grpc::CallbackServerContext* context, const Request& request,
                                     v1::GenerateResponse* response);
  template <typename Request>
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* RunStream(
      grpc::CallbackServerContext* context, const Request& request);
  absl::StatusOr<std::shared_ptr<engine::Engine>> EngineOf(const std::string& model) const;

  ModelStore* const models_;
  Clock* const clock_;
  std::atomic<uint64_t> n_requests_ = 0;
  StallMonitor stall_monitor_;
};

}  // namespace walsh::service
