// Calls from the coordinator to a worker, none of which holds a thread.
//
// Errors:  those of the worker, as it sent them; UNAVAILABLE (ErrorInfo WORKER_LOST) when the
//          connection failed, without the address that gRPC's own message would show.
// Threads: safe. Callbacks run on gRPC's threads, exactly once, and must not block.
#pragma once

#include <grpcpp/channel.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/grpc_cancellation.h"
#include "common/grpc_connection_pool.h"
#include "server/fleet/placement.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "walsh/v1/evaluation.grpc.pb.h"
#include "walsh/v1/generation.grpc.pb.h"

namespace walsh::fleet {

namespace internal_v1 = walsh::internal::v1;

// What a call to a worker ended with, fit for a client. UNAVAILABLE (WORKER_LOST) when the
// connection broke, (WORKER_REFUSES) when the worker does not know this coordinator.
absl::Status FromWorker(const grpc::Status& status);
// True: the status says nothing about what was asked.
bool GaveNoAnswer(const absl::Status& status);
// Whether a worker ended a call because it, or the model there, is leaving: another one may take
// it. Not so after DEVICE_BROKEN, which what the call asked for may have brought about.
bool IsLeaving(const absl::Status& status);

// Generation and evaluation run on connections of their own, as many as their calls need: a worker
// that is full says so, and loading, unloading and validation never wait behind streams.
class WorkerClient {
 public:
  WorkerClient(const std::string& address, const ChannelSecurity& security);

  template <typename T>
  using Callback = std::function<void(absl::StatusOr<T>)>;
  // What ends a call early, with CANCELLED; null: nothing but its timeout does.
  using CancellationPtr = std::shared_ptr<Cancellation>;

  void ValidateJob(const internal_v1::ValidateJobRequest& request, absl::Duration timeout,
                   CancellationPtr cancellation, Callback<internal_v1::ValidateJobResponse> done);
  // `model` is "models/{id}".
  void LoadModel(const std::string& model, absl::Duration timeout, CancellationPtr cancellation,
                 Callback<v1::Model> done);
  void UnloadModel(const std::string& model, absl::Duration timeout, CancellationPtr cancellation,
                   Callback<v1::Model> done);
  void DeleteModel(const std::string& model, absl::Duration timeout, CancellationPtr cancellation,
                   Callback<google::protobuf::Empty> done);

  // The request must outlive the call, and so must this client.
  void ExportModel(grpc::ClientContext* context, const v1::ExportModelRequest* request,
                   grpc::ClientReadReactor<v1::ExportModelResponse>* reader);
  void ImportModel(grpc::ClientContext* context, const v1::ImportModelRequest* request,
                   grpc::ClientReadReactor<v1::ImportModelResponse>* reader);

  struct GenerationStubs {
    explicit GenerationStubs(const std::shared_ptr<grpc::Channel>& channel)
        : generation(v1::GenerationService::NewStub(channel)),
          evaluation(v1::EvaluationService::NewStub(channel)) {}
    const std::unique_ptr<v1::GenerationService::Stub> generation;
    const std::unique_ptr<v1::EvaluationService::Stub> evaluation;
  };
  using GenerationPool = ConnectionPool<GenerationStubs>;
  // A place for one call; the client must outlive it.
  GenerationPool::Lease AcquireGeneration() { return generation_.Acquire(); }

 private:
  const std::unique_ptr<internal_v1::ModelHostService::Stub> host_;
  GenerationPool generation_;
};

// One client, with its connections, for each address that is in use.
class WorkerClients {
 public:
  // `security` is asked each time; when its answer has changed, as when certificates are renewed,
  // a worker gets a new client, and calls that run end with the one that they have.
  using Security = std::function<ChannelSecurity()>;
  explicit WorkerClients(Security security) : security_(std::move(security)) {}

  std::shared_ptr<WorkerClient> Get(const WorkerAddress& worker);
  // Calls that run keep their client.
  void Forget(const std::string& worker_id);
  // Forgets all others, also those that somebody who had chosen a worker brought back with Get
  // after the worker was forgotten.
  void KeepOnly(const std::set<std::string>& worker_ids);

 private:
  struct Entry {
    std::string address;
    ChannelSecurity security;
    std::shared_ptr<WorkerClient> client;
  };
  const Security security_;
  absl::Mutex mu_;
  std::map<std::string, Entry> clients_ ABSL_GUARDED_BY(mu_);  // by worker id
};

}  // namespace walsh::fleet
