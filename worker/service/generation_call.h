// One generation as a gRPC call: the engine's events in, messages out.
//
// A call is two objects, because they live differently long: the reactor, which gRPC keeps until
// the call is over, and the sink, which the engine holds until it sent its last event. The sink
// never blocks the engine: it queues (chunk_queue.h), and at most one write is under way.
//
// Threads: the engine's, gRPC's and the stall monitor's. State is behind one mutex per call;
//          nothing is called into gRPC or the engine while it is held, since gRPC may call back
//          from inside.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "worker/engine/engine.h"
#include "worker/service/chunk_queue.h"

namespace walsh::service {

// What a call knows of its request. The engine is held weakly: a slow reader must not keep an
// unloaded model in memory.
struct CallInfo {
  std::string request_id;  // as the client knows it
  std::string engine_id;   // as the engine knows it
  std::string model;       // full name
  uint64_t seed = 0;
  int prompt_tokens = 0;
  absl::Duration arrival;  // on the clock
  Clock* clock = nullptr;
  std::weak_ptr<engine::Engine> engine;
  const Tokenizer* tokenizer = nullptr;  // the engine's: valid while it calls the sink
};

// How an outcome ends a call: OK with a last message, CANCELLED, or DEADLINE_EXCEEDED when the
// deadline came before the first token.
absl::Status EndStatus(const engine::Outcome& outcome);

// One line for each request that ended, under the id that its client knows.
void LogFinished(const CallInfo& info, const engine::Outcome& outcome);
void LogFailed(const CallInfo& info, const absl::Status& status);

// Collects a generation into one response.
class UnaryCall final : public engine::Sink {
 public:
  // The reactor deletes itself; until the call is ended by an event of the engine or by Fail, it
  // and `response` stay.
  static std::shared_ptr<UnaryCall> Start(CallInfo info, v1::GenerateResponse* response);
  grpc::ServerUnaryReactor* reactor() { return reactor_; }

  void Fail(const absl::Status& status);
  void OnStarted(double queue_seconds) override;
  void OnDelta(engine::Delta delta) override;
  void OnFinished(const engine::Outcome& outcome) override;
  void OnFailed(const absl::Status& status) override { Fail(status); }

 private:
  class Reactor;
  void End(const absl::Status& status);
  UnaryCall(CallInfo info, v1::GenerateResponse* response)
      : info_(std::move(info)), response_(response) {}

  const CallInfo info_;
  v1::GenerateResponse* const response_;
  grpc::ServerUnaryReactor* reactor_ = nullptr;
};

// Streams a generation.
class StreamCall final : public engine::Sink {
 public:
  static std::shared_ptr<StreamCall> Start(CallInfo info, grpc::CallbackServerContext* context);
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* reactor() { return reactor_; }

  void Fail(const absl::Status& status);
  void OnStarted(double queue_seconds) override;
  void OnDelta(engine::Delta delta) override;
  void OnFinished(const engine::Outcome& outcome) override;
  void OnFailed(const absl::Status& status) override { Fail(status); }

  // Ends the call when its reader took nothing for `limit`.
  void EndIfStalled(absl::Duration limit);

 private:
  class Reactor;
  StreamCall(CallInfo info, grpc::CallbackServerContext* context)
      : info_(std::move(info)), context_(context) {}

  void End(const absl::Status& status);
  void Push(v1::GenerateStreamResponse message);
  // Starts the next write, or ends the call; called after every change, without the lock.
  void Pump();
  void OnWriteDone(bool ok);

  const CallInfo info_;
  grpc::CallbackServerContext* const context_;  // valid until OnDone
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* reactor_ = nullptr;

  std::mutex mu_;
  ChunkQueue queue_;
  v1::GenerateStreamResponse writing_;  // while is_writing_: gRPC's
  bool is_writing_ = false;
  bool is_pinned_ = false;    // the call must not end just now
  bool is_finished_ = false;  // Finish was called
  absl::Duration write_start_;
  std::optional<absl::Status> end_;  // sent once the queue is empty
};

}  // namespace walsh::service
