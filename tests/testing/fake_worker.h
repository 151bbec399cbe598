// A worker whose every step a test decides: its side of the worker protocol as calls, and the
// services that it hosts as functions.
//
// Threads: the functions are called on gRPC's threads and may block; everything else from one
// thread.
#pragma once

#include <grpcpp/server.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh::testing {

class FakeWorker {
 public:
  using Lease = walsh::internal::v1::Lease;
  using Stage = v1::QuantizationJob::Stage;
  static constexpr int64_t kModelBytes = 1000;  // of what its jobs make
  using StreamWriter = grpc::ServerWriter<v1::GenerateStreamResponse>;

  // Serves on a free port; `coordinator` is the address of the internal port. Not yet registered.
  FakeWorker(const std::string& coordinator, const std::string& id);
  ~FakeWorker();

  // -- What it hosts; set before they are called. By default: validation succeeds, loading and
  // unloading change the state, generation is UNIMPLEMENTED.
  // Before the others, for every unary call.
  std::function<void(const std::string& method, grpc::ServerContext*)> on_call;
  std::function<grpc::Status(const walsh::internal::v1::ValidateJobRequest&,
                             walsh::internal::v1::ValidateJobResponse*)>
      on_validate;
  std::function<grpc::Status(grpc::ServerContext*, const std::string& model)> on_load;
  std::function<grpc::Status(const std::string& model)> on_unload;
  std::function<grpc::Status(grpc::ServerContext*, const v1::GenerateRequest&,
                             v1::GenerateResponse*)>
      on_generate;
  std::function<grpc::Status(grpc::ServerContext*, const v1::GenerateRequest&, StreamWriter*)>
      on_stream;

  // -- Its side of the protocol.
  absl::Status Register();
  absl::StatusOr<std::optional<Lease>> Acquire(absl::Duration wait = absl::Seconds(5));
  // The lease, which must be there.
  Lease MustAcquire();
  absl::StatusOr<walsh::internal::v1::HeartbeatResponse> Heartbeat();
  absl::StatusOr<walsh::internal::v1::HeartbeatResponse> Heartbeat(const Lease& lease);
  absl::Status Report(const Lease& lease, Stage stage, double fraction,
                      const std::string& message = "");
  absl::Status Succeed(const Lease& lease);
  absl::Status Fail(const Lease& lease, absl::StatusCode code, const std::string& reason);
  // It cannot run the job, another one might.
  absl::Status Refuse(const Lease& lease, absl::StatusCode code, const std::string& message,
                      const std::string& reason);
  absl::Status AcknowledgeCancel(const Lease& lease);
  absl::Status Drain();
  absl::Status Deregister();

  // Its artifacts, told with registration and heartbeats.
  void SetModel(const std::string& name, v1::Model::State state);
  std::optional<v1::Model::State> ModelState(const std::string& name) const;
  void set_load(int running, int waiting);
  void set_draining(bool draining) { draining_ = draining; }

  // The services vanish as with kill -9: connections break.
  void Vanish();

  const std::string& id() const { return id_; }
  const std::string& address() const { return address_; }

 private:
  class Host;
  class Generation;

  walsh::internal::v1::HeartbeatRequest HeartbeatRequest() const;
  void Tell(const char* method, grpc::ServerContext* context) const;

  const std::string id_;
  const std::unique_ptr<walsh::internal::v1::WorkerService::Stub> stub_;
  std::string address_;
  bool draining_ = false;
  int running_ = 0;
  int waiting_ = 0;
  mutable absl::Mutex mu_;
  std::vector<v1::Model> models_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<Host> host_;
  std::unique_ptr<Generation> generation_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace walsh::testing
