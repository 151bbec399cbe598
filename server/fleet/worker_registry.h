// The workers that are there: what they told at registration and with their last heartbeat.
//
// In memory only; after a restart of the coordinator each worker's next call answers NOT_FOUND and
// it registers again. A worker that is silent for the lease time is OFFLINE: it stays listed for a
// while, and its models serve no more.
//
// Errors:  INVALID_ARGUMENT a bad registration; NOT_FOUND (ErrorInfo WORKER_UNKNOWN) register
// again. Threads: safe; nothing blocks.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "server/fleet/placement.h"
#include "walsh/internal/v1/worker.pb.h"
#include "walsh/v1/model.pb.h"

namespace walsh::fleet {

namespace internal_v1 = walsh::internal::v1;

class WorkerRegistry {
 public:
  struct Options {
    absl::Duration offline_after = absl::Seconds(30);
    absl::Duration forget_after = absl::Hours(1);
  };
  WorkerRegistry(const Clock* clock, const Options& options)
      : clock_(clock), options_(options), last_departure_(clock->Monotonic()) {}

  // The ids of workers that had the same address: processes that are no more.
  absl::StatusOr<std::vector<std::string>> Register(const internal_v1::RegisterRequest& request);
  absl::Status Heartbeat(const internal_v1::HeartbeatRequest& request);
  // Any other call of a registered worker: a sign of life.
  absl::Status Touch(const std::string& worker_id);
  // The worker takes nothing new from now on, whatever a heartbeat that was on its way says: a
  // process that drains does not come back.
  absl::Status Drain(const std::string& worker_id);
  void Deregister(const std::string& worker_id);
  // Turns silent workers OFFLINE and forgets old ones. The ids that just went offline.
  std::vector<std::string> Tick();

  std::vector<v1::Worker> List() const;
  // The workers that are there and have the model's artifact.
  std::vector<Replica> Replicas(const std::string& model_id) const;
  // All of them, by model id.
  std::map<std::string, std::vector<Replica>> AllReplicas() const;
  // The workers that are ONLINE, the least busy one first.
  std::vector<WorkerAddress> Online() const;
  // Those of them that can fetch a model which no worker has, and remove it from where it is kept.
  std::vector<WorkerAddress> WithArtifactStore() const;
  // The names of those that take jobs, now or when the one that they run is over. None can be told
  // while a worker drains, and within `offline_after` of the start and of the last departure: a
  // worker that restarts, or that had registered before the coordinator did, is given the time to
  // come back that a silent one has.
  std::optional<std::set<std::string>> TakingJobs() const;
  bool IsDraining(const std::string& worker_id) const;
  // The ids of those that are not OFFLINE.
  std::set<std::string> Connected() const;

  // What a call to or from the worker brought about, ahead of its next heartbeat. Models carry
  // revisions: a heartbeat that was on its way meanwhile does not undo it.
  void SetModel(const std::string& worker_id, const v1::Model& model);
  void SetModelState(const std::string& worker_id, const std::string& model_id,
                     v1::Model::State state);
  // Only while the state is `from`: nothing newer is known.
  void ReplaceModelState(const std::string& worker_id, const std::string& model_id,
                         v1::Model::State from, v1::Model::State to);
  void RemoveModel(const std::string& worker_id, const std::string& model_id);
  void SetRunningJob(const std::string& worker_id, const std::string& job_name);
  // The worker that ChooseForGeneration gives for a request that is sent there at once; each that
  // succeeds is ended by EndRequest. Choosing and counting are one step, so that whoever closes the
  // model sees the request or is seen by it. Never one of `refused`, which have refused the
  // request.
  absl::StatusOr<WorkerAddress> BeginRequest(const std::string& model_id,
                                             const std::set<std::string>& refused = {});
  void EndRequest(const std::string& worker_id, const std::string& model_id);
  // Requests to the model that this coordinator has sent to the worker and that have not ended.
  int RequestsOf(const std::string& worker_id, const std::string& model_id) const;
  // To any model.
  int RequestsOf(const std::string& worker_id) const;
  // Between these two no new request goes to the model there, whatever heartbeats say: it is about
  // to be unloaded.
  void CloseModel(const std::string& worker_id, const std::string& model_id);
  void OpenModel(const std::string& worker_id, const std::string& model_id);
  // Evaluations, likewise.
  void BeginEvaluation(const std::string& worker_id);
  void EndEvaluation(const std::string& worker_id);

 private:
  struct Entry {
    v1::Worker worker;
    std::string address;
    bool has_artifact_store = false;
    absl::Duration last_seen;                 // monotonic
    std::map<std::string, v1::Model> models;  // by id
  };
  // What has been begun with a worker and not ended. It outlives the worker's entry, so that each
  // end belongs to its begin when the worker was forgotten meanwhile and came back.
  struct Begun {
    std::map<std::string, int> requests;  // by model id, above 0
    std::map<std::string, int> closings;  // of models, likewise
    int evaluations = 0;
    bool empty() const { return requests.empty() && closings.empty() && evaluations == 0; }
  };

  // Null when there is none.
  v1::Model* FindModel(const std::string& worker_id, const std::string& model_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void See(Entry* entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Replica> ReplicasOf(const std::string& model_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int RequestsLocked(const std::string& worker_id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Nothing for a worker with which nothing has been begun.
  const Begun& BegunWith(const std::string& worker_id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends one that was begun.
  void CountDown(const std::string& worker_id, std::map<std::string, int> Begun::*counts,
                 const std::string& model_id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes what a heartbeat lists, but for models of which something newer is known.
  static void SetModels(const google::protobuf::RepeatedPtrField<v1::Model>& models,
                        int64_t revision, Entry* entry);
  std::vector<WorkerAddress> OnlineWhere(absl::FunctionRef<bool(const Entry&)> condition) const;
  int Load(const std::string& worker_id, const Entry& entry) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Replica ToReplica(const std::string& worker_id, const Entry& entry, const std::string& model_id,
                    const v1::Model& model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock* const clock_;
  const Options options_;
  mutable absl::Mutex mu_;
  // Monotonic, of a worker that left, was replaced or became OFFLINE; at first of the start.
  absl::Duration last_departure_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Entry> workers_ ABSL_GUARDED_BY(mu_);  // by id
  std::map<std::string, Begun> begun_ ABSL_GUARDED_BY(mu_);    // by worker id, not empty
};

}  // namespace walsh::fleet
