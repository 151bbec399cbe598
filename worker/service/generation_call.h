// One generation as a gRPC call: the engine's events in, messages out.
//
// A call is two objects, because they live differently long: the reactor, which gRPC keeps until
// the call is over, and the sink, which the engine holds until it sent its last event. The sink
// never blocks the engine: it queues (chunk_queue.h), and at most one write is under way.
//
// A call begins before its request is ready for the engine, and may be cancelled before it is.
//
// Threads: the engine's, gRPC's, the stall monitor's and the one that prepares the request. State
//          is behind one mutex per call; nothing is called into gRPC or the engine while it is
//          held, since gRPC may call back from inside.
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

// What is known of a call before its request is looked at.
struct CallInfo {
  std::string request_id;  // as the client knows it
  std::string model;       // full name; empty when the request's is none
  absl::Duration arrival;  // on the clock
  Clock* clock = nullptr;
};

// How an outcome ends a call: OK with a last message, CANCELLED, or DEADLINE_EXCEEDED when the
// deadline came before the first token.
absl::Status EndStatus(const engine::Outcome& outcome);

// What both kinds of call have in common: their request's way into the engine and out of it, and
// one line in the log for each that ended, under the id that its client knows.
class GenerationCall : public engine::Sink, public std::enable_shared_from_this<GenerationCall> {
 public:
  // Hands the request over; at most once. On an error (Engine::Submit's) the engine does not know
  // the call, and the caller ends it with Fail. A cancel that came before counts from here on.
  absl::Status Submit(const std::shared_ptr<engine::Engine>& engine, engine::Request request);
  // The client went away.
  void Cancel();
  bool is_cancelled() const;
  // Ends a call that is not in the engine.
  void Fail(const absl::Status& status);
  void OnFailed(const absl::Status& status) final { Fail(status); }

 protected:
  explicit GenerationCall(CallInfo info) : info_(std::move(info)) {}
  virtual void End(const absl::Status& status) = 0;
  // Takes the request out of the engine, which answers with OnFailed.
  void FailInEngine(const absl::Status& why);
  void LogFinished(const engine::Outcome& outcome) const;

  const CallInfo info_;
  // Set by Submit before the engine knows the sink, and not changed after.
  uint64_t seed_ = 0;
  int prompt_tokens_ = 0;
  const Tokenizer* tokenizer_ = nullptr;  // the engine's: valid while it calls the sink

 private:
  // The engine, if the request was handed to one that is still there.
  std::shared_ptr<engine::Engine> FindEngine() const;

  mutable std::mutex submit_mu_;
  bool is_cancelled_ = false;
  // Weak: a slow reader must not keep an unloaded model in memory.
  std::weak_ptr<engine::Engine> engine_;
  std::string engine_id_;  // as the engine knows the request
};

// Collects a generation into one response.
class UnaryCall final : public GenerationCall {
 public:
  // The reactor deletes itself; until the call is ended by an event of the engine or by Fail, it
  // and `response` stay.
  static std::shared_ptr<UnaryCall> Start(CallInfo info, v1::GenerateResponse* response);
  grpc::ServerUnaryReactor* reactor() { return reactor_; }

  void OnStarted(double queue_seconds) override;
  void OnDelta(engine::Delta delta) override;
  void OnFinished(const engine::Outcome& outcome) override;

 private:
  class Reactor;
  void End(const absl::Status& status) override;
  UnaryCall(CallInfo info, v1::GenerateResponse* response)
      : GenerationCall(std::move(info)), response_(response) {}

  v1::GenerateResponse* const response_;
  int64_t response_bytes_ = 0;
  absl::Status overflow_;  // not OK once the response outgrew a message
  grpc::ServerUnaryReactor* reactor_ = nullptr;
};

// Streams a generation.
class StreamCall final : public GenerationCall {
 public:
  // A token that comes less than `interval` after those sent last waits for the next one, if the
  // engine expects that within `interval` too.
  static std::shared_ptr<StreamCall> Start(CallInfo info, grpc::CallbackServerContext* context,
                                           absl::Duration interval);
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* reactor() { return reactor_; }

  void OnStarted(double queue_seconds) override;
  void OnDelta(engine::Delta delta) override;
  void OnFinished(const engine::Outcome& outcome) override;

  // Ends the call when its reader took nothing for `limit`.
  void EndIfStalled(absl::Duration limit);

 private:
  class Reactor;
  StreamCall(CallInfo info, grpc::CallbackServerContext* context, absl::Duration interval)
      : GenerationCall(std::move(info)), context_(context), interval_(interval) {}

  void End(const absl::Status& status) override;
  // `may_wait`: for the message after this one.
  void Push(v1::GenerateStreamResponse message, bool may_wait = false);
  // Starts the next write, or ends the call; called after every change, without the lock.
  void Pump();
  void OnWriteDone(bool ok);

  grpc::CallbackServerContext* const context_;  // valid until OnDone
  const absl::Duration interval_;
  grpc::ServerWriteReactor<v1::GenerateStreamResponse>* reactor_ = nullptr;

  std::mutex mu_;
  ChunkQueue queue_;
  v1::GenerateStreamResponse writing_;  // while is_writing_: gRPC's
  bool is_writing_ = false;
  bool is_holding_ = false;   // what is queued waits for the next token
  bool is_pinned_ = false;    // the call must not end just now
  bool is_finished_ = false;  // Finish was called
  absl::Duration write_start_;
  absl::Duration delta_start_ = -absl::InfiniteDuration();  // of the last write of tokens
  std::optional<absl::Status> end_;                         // sent once the queue is empty
};

}  // namespace walsh::service
