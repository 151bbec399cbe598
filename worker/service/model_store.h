// The models of this worker: artifacts on its disk, and the engines of those that are loaded.
//
// Each artifact is a directory <root>/<id> with a walsh.json. A directory appears by one rename
// (Publish) and disappears by one (Delete), so no reader ever sees half of one. Names that begin
// with a dot are temporary and this store's own; anything else that is not an artifact is left
// alone.
//
// States: UNLOADED → LOADING → READY → DRAINING → UNLOADING → UNLOADED; a failed load gives
//         FAILED with the reason and leaves nothing in memory. Loads and unloads run one at a
//         time, so that two never need the memory of both. UNLOADED means that the engine is gone:
//         an unload waits for calls that found it before, which are refused at their next step.
// Several models share the worker's memory: each KV cache takes what engine::Options says of what
// is free when its model is loaded, less what the caches before it may still come to take.
//
// With an artifact store, a model that is not here and that the store has is fetched when it is
// loaded, and what is deleted here is deleted there. A model that is being fetched is not deleted,
// and one that is being deleted is not fetched; several are fetched at once.
//
// Errors: NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION (loaded), UNAVAILABLE with reason
//         MODEL_LOADING (being fetched), RESOURCE_EXHAUSTED with reason INSUFFICIENT_MEMORY, those
//         of reading artifacts and of ExclusiveUse, which leave a model as it was
// Threads: safe. Load and Unload block; the rest does not wait for them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/keep_going.h"
#include "walsh/v1/model.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/request_count.h"
#include "worker/engine/served_model.h"
#include "worker/service/artifact_store.h"
#include "worker/service/exclusive_use.h"

namespace walsh::service {

class ModelStore {
 public:
  // Reads an artifact's directory into memory.
  using Loader = std::function<absl::StatusOr<std::shared_ptr<engine::ServedModel>>(
      const std::string& directory)>;
  struct Options {
    std::string root;
    std::string worker_id;
    engine::Options engine;
    absl::Duration drain_timeout = absl::Seconds(30);
    Loader loader;
    // Bytes that this process may still allocate; 0 or no function: not known.
    std::function<int64_t()> free_memory = {};
    // Asked before each load, and told when its model is gone; null: models are loaded whatever
    // else runs. Outlives the store.
    ExclusiveUse* exclusive = nullptr;
    // Where artifacts are kept besides; null: nowhere. Outlives the store.
    ArtifactStore* artifacts = nullptr;
  };

  // Creates the root, removes temporaries that a dead process left, and lists the artifacts.
  static absl::StatusOr<std::unique_ptr<ModelStore>> Open(Options options, Clock* clock);

  // All models, and the latest revision among their changes, deletions included.
  struct Listing {
    std::vector<v1::Model> models;
    int64_t revision = 0;
  };
  Listing List() const;
  absl::StatusOr<v1::Model> Get(const std::string& id) const;
  // Returns when the model serves, or with the reason why it cannot. OK when it already does.
  absl::StatusOr<v1::Model> Load(const std::string& id);
  // Returns when it is unloaded and its memory is free. Running requests finish first; those that
  // still run after the drain timeout fail with UNAVAILABLE, reason MODEL_UNLOADING. OK when it is
  // not loaded. Must not be called by a thread that holds an engine of FindEngine.
  absl::StatusOr<v1::Model> Unload(const std::string& id);
  absl::Status Delete(const std::string& id);
  // The folder of a model's artifact. It goes with the model; a reader that is open reads on.
  absl::StatusOr<std::string> ArtifactDirectory(const std::string& id) const;
  // Refuses new requests of all models and waits for the running ones; those that still run after
  // the timeout fail with UNAVAILABLE, reason WORKER_STOPPING.
  void DrainAll(absl::Duration timeout);

  // The engine of a loaded model: NOT_FOUND for an unknown one, UNAVAILABLE with reason
  // MODEL_LOADING or MODEL_UNLOADING, FAILED_PRECONDITION with reason MODEL_NOT_LOADED. Hold it for
  // the length of a call's preparation only: an unload waits for it.
  absl::StatusOr<std::shared_ptr<engine::Engine>> FindEngine(const std::string& id) const;
  // Sums over all loaded models; the heartbeat is the oldest one.
  engine::Stats TotalStats() const;
  // Whether all engines turn; UNAVAILABLE when one has neither turned nor gone on to another layer
  // of its step for 60 s. An idle one turns twice a second.
  absl::Status CheckEngines() const;
  // Of all loaded models.
  engine::RequestCount* requests() const { return requests_.get(); }

  // A model's artifact. It goes when the model is deleted, whoever reads it.
  std::string Directory(const std::string& id) const;
  // Where a job builds its artifact; unique by job and token.
  std::string TemporaryDirectory(std::string_view job_id, int64_t fencing_token) const;
  // ALREADY_EXISTS (ErrorInfo MODEL_EXISTS) when a model or anything else has the name: a damaged
  // artifact, which is not listed, is in the way of a new one as well.
  absl::Status CheckNameIsFree(const std::string& id) const;
  // Moves a finished artifact, which is read first, to its name and remembers the job that made it.
  // ALREADY_EXISTS when there is one.
  absl::StatusOr<v1::Model> Publish(const std::string& from, const std::string& id,
                                    const std::string& job_name);
  // Copies a model to the artifact store, where there is one and it is not there already.
  absl::Status Keep(const std::string& id, const ArtifactStore::Origin& origin,
                    const KeepGoing& keep_going);
  // Makes a model of the artifact store one of this worker's. NOT_FOUND without a store, or where
  // it has none; ALREADY_EXISTS where `is_wanted` does not want what it has. Asks `keep_going` also
  // while it waits for the endpoint, or for another who fetches or deletes the model.
  absl::StatusOr<v1::Model> Fetch(
      const std::string& id,
      const std::function<bool(const ArtifactStore::Origin&)>& is_wanted = {},
      const KeepGoing& keep_going = {});

  // Called after every change of a model's state, from the thread that changed it.
  using Listener = std::function<void(const v1::Model&)>;
  void set_listener(Listener listener);

 private:
  // An engine, and the future that is ready once its destructor has run: the last who holds it may
  // be a call's handler.
  struct Hosted {
    std::shared_ptr<engine::Engine> engine;
    std::shared_future<void> is_gone;
  };
  struct Entry {
    v1::Model model;
    Hosted hosted;  // empty unless READY or DRAINING
  };

  ModelStore(Options options, Clock* clock);
  // The job's name is kept beside the artifact, whose own bytes depend on its inputs alone.
  std::string OriginPath(const std::string& id) const;
  void RemoveTemporaries();
  // Waits until nobody else fetches or deletes the model, and lets nobody while the result lives.
  class Move;
  absl::StatusOr<std::unique_ptr<Move>> BeginMove(const std::string& id,
                                                  const KeepGoing& keep_going);
  absl::StatusOr<v1::Model> ReadArtifact(const std::string& id, const std::string& directory) const;
  absl::StatusOr<v1::Model> FetchInto(const std::string& id, const std::string& directory,
                                      const KeepGoing& keep_going);
  // A load's shortage of memory, with what the models of this worker hold and what an operator can
  // do about it.
  absl::Status ExplainShortage(const absl::Status& shortage) const;
  // A model that BeginModel was asked for is gone, or was not loaded.
  void EndModel() const;
  absl::StatusOr<Hosted> StartEngine(const std::string& id) const;
  // What a new engine may take: free memory, without what the others may still come to use.
  std::optional<int64_t> UnpromisedBytes() const;
  // Changes a model and tells the listener; the new state.
  v1::Model Update(const std::string& id, const std::function<void(Entry&)>& change);
  std::vector<std::pair<std::string, std::shared_ptr<engine::Engine>>> Engines() const;

  const Options options_;
  Clock* const clock_;
  // Engines that a call still holds may outlive the store.
  const std::shared_ptr<engine::RequestCount> requests_ = std::make_shared<engine::RequestCount>();
  std::mutex load_mu_;  // held through a load, an unload or a delete
  std::mutex publish_mu_;
  std::atomic<bool> is_draining_ = false;
  mutable std::mutex mu_;
  std::condition_variable moved_;
  std::set<std::string> moving_;  // ids that are fetched or deleted; guarded by mu_
  Listener listener_;
  std::map<std::string, Entry> entries_;
  int64_t revision_ = 0;  // of the latest change
};

}  // namespace walsh::service
