// walsh.v1.GenerationService on a worker: from a request to the engine of its model.
//
// Validated again here, since the port may be reached by others than the coordinator. Requests are
// turned into tokens and submitted on threads of this service, since a long prompt takes its time
// and gRPC's few threads carry the writes and cancels of all streams; nothing waits for the model.
//
// Errors:  INVALID_ARGUMENT    a field, with reason CONTEXT_LENGTH_EXCEEDED a prompt too long, a
//                              unary answer that would not fit a message
//          RESOURCE_EXHAUSTED  the model's queue or that of requests being prepared is full (with
//                              a retry delay), a stalled reader
//          others              as ModelStore::FindEngine, ChatTokens and Engine::Submit give them
// Threads: handlers run on gRPC's callback threads
#pragma once

#include <grpcpp/server_context.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/limits.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "worker/service/model_store.h"
#include "worker/service/stall_monitor.h"

namespace walsh::service {

class GenerationService final : public v1::GenerationService::CallbackService {
 public:
  struct Options {
    absl::Duration stall_limit = absl::Seconds(limits::kStreamStallSecondsMax);
    absl::Duration stream_interval = absl::Milliseconds(limits::kStreamIntervalMsDefault);
    int preparing_threads = 0;                          // 0: by the machine's
    int preparing_max = limits::kPreparingRequestsMax;  // that wait for one of them
  };
  GenerationService(ModelStore* models, Clock* clock)
      : GenerationService(models, clock, Options()) {}
  GenerationService(ModelStore* models, Clock* clock, const Options& options);

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
  // A request in the engine's terms.
  struct Prepared {
    std::shared_ptr<engine::Engine> engine;
    engine::Request request;
  };
  template <typename Request>
  CallInfo Arrive(const grpc::CallbackServerContext& context, const Request& request) const;
  template <typename Request>
  absl::StatusOr<Prepared> Prepare(grpc::CallbackServerContext* context, const Request& request,
                                   const CallInfo& info, const GenerationCall& call);
  // Prepares and submits, or ends the call with the reason why not.
  template <typename Call, typename Request>
  void Run(grpc::CallbackServerContext* context, const Request& request, const CallInfo& info,
           const std::shared_ptr<Call>& call);
  // Has Run called by a thread of preparing_.
  template <typename Call, typename Request>
  void RunSoon(grpc::CallbackServerContext* context, const Request& request, const CallInfo& info,
               std::shared_ptr<Call> call);
  // The same for a call that needs no engine's turn.
  grpc::ServerUnaryReactor* AnswerSoon(grpc::CallbackServerContext* context,
                                       const std::string& model,
                                       std::function<absl::Status()> answer);
  absl::Status TooManyPreparing(const std::string& model) const;
  template <typename Request>
  grpc::ServerUnaryReactor* RunUnary(grpc::CallbackServerContext* context, const Request& request,
                                     v1::GenerateResponse* response);
  template <typename Request>
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* RunStream(
      grpc::CallbackServerContext* context, const Request& request);
  absl::StatusOr<std::shared_ptr<engine::Engine>> EngineOf(const std::string& model) const;

  const Options options_;
  ModelStore* const models_;
  Clock* const clock_;
  std::atomic<uint64_t> n_requests_ = 0;
  StallMonitor stall_monitor_;
  Executor preparing_;  // last: its tasks use all of the above
};

}  // namespace walsh::service
