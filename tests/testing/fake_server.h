// An in-process walsh service for tests of clients: it keeps jobs, events and models in memory, and
// fails where a test tells it to.
//
// It "works" as the protos promise (replay of events, pages, idempotent creation); it quantizes and
// generates nothing.
//
// Threads: safe.
#pragma once

#include <grpcpp/server.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "walsh/v1/generation.pb.h"
#include "walsh/v1/model.pb.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::testing {

class FakeServer {
 public:
  FakeServer();
  ~FakeServer();
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;

  std::string address() const;
  void Stop();   // as a crash does: open calls end with UNAVAILABLE or CANCELLED
  void Start();  // again, on the same port

  // -- Failures. Methods are named without their service: "GetModel".
  // The next `n` calls of a method end with `status` before they do anything.
  void FailNext(const std::string& method, int n, const grpc::Status& status);
  int Calls(const std::string& method) const;
  // The peers ("ipv4:127.0.0.1:1234") that have called: one a connection.
  int n_peers() const;

  // -- Jobs. Lists know one filter: model_name=NAME.
  // Appends an event with the next sequence; a terminal state ends the job's streams.
  void AddEvent(const std::string& job_name, v1::QuantizationJobEvent event);
  // Watch streams end with `status` after so many events each; -1: never.
  void CutWatchAfter(int n_events, const grpc::Status& status);
  // Watch streams skip the event with this sequence.
  void LoseEvent(int64_t sequence);
  // Watch streams say nothing, not even heartbeats, for the next `n` streams.
  void SilenceNextWatch(int n);
  // Watch streams begin with a heartbeat; CutWatchAfter() does not count it.
  void BeginWatchesWithAHeartbeat();
  v1::QuantizationJob* mutable_job(const std::string& name);  // not while calls run
  std::vector<v1::CreateQuantizationJobRequest> create_requests() const;
  std::vector<int64_t> watched_after() const;  // after_sequence of every Watch call

  // -- Models, workers
  void AddModel(const v1::Model& model);
  void AddWorker(const v1::Worker& worker);
  void SetPageSizeMax(int n);
  // Loads last until the client gives them up.
  void HangLoads();

  // -- Generation
  // The deltas of every stream, and the pause before each.
  void SetStream(std::vector<std::string> deltas, absl::Duration pause);
  // Streams end with `status` after so many deltas; -1: never.
  void CutStreamAfter(int n_deltas, const grpc::Status& status);
  int n_streams() const;            // open now
  int n_streams_max() const;        // open at once so far
  int n_streams_cancelled() const;  // ended by the client
  std::vector<v1::ChatRequest> chat_requests() const;
  std::vector<v1::GenerateRequest> generate_requests() const;

 private:
  struct State;
  class Quantization;
  class Models;
  class Generation;

  std::unique_ptr<State> state_;
  std::unique_ptr<Quantization> quantization_;
  std::unique_ptr<Models> models_;
  std::unique_ptr<Generation> generation_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace walsh::testing
