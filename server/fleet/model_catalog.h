// The published models: rows of the store, joined with what the workers say.
//
// A model is known from the moment that its job has succeeded, or that a worker shows up with it,
// and until it is deleted; where it is loaded is the workers' word alone.
//
// Errors:  NOT_FOUND; those of the store.
// Threads: safe. Learn and Forget may block on the disk, when there is something new.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/fleet/placement.h"
#include "server/fleet/worker_registry.h"
#include "server/jobs/job_store.h"
#include "walsh/v1/model.pb.h"

namespace walsh::fleet {

class ModelCatalog {
 public:
  // All three outlive the catalog.
  static absl::StatusOr<std::unique_ptr<ModelCatalog>> Open(jobs::JobStore* store,
                                                            const WorkerRegistry* registry,
                                                            const Clock* clock);

  using Models = google::protobuf::RepeatedPtrField<v1::Model>;
  // Whether Learn would write anything.
  bool HasNews(const Models& models) const;
  // Stores models that are new. A known one is left alone: two workers with different artifacts of
  // one name would otherwise write with every heartbeat.
  absl::Status Learn(const Models& models);
  // A job made it; the row is stored with the job.
  void Publish(const v1::Model& model);
  // A model that was deleted. Late heartbeats that still name it are ignored for a while.
  absl::Status Forget(const std::string& id);

  bool Knows(const std::string& id) const;
  absl::StatusOr<v1::Model> Get(const std::string& id) const;
  // Models with an id above `after`, by id, at most `n_max`.
  std::vector<v1::Model> List(const std::string& after, int n_max) const;
  // Every model with its state.
  std::map<std::string, v1::Model::State> States() const;

  // What of a model is the same wherever it is: the row of the store.
  static v1::Model Row(const v1::Model& model);

 private:
  ModelCatalog(jobs::JobStore* store, const WorkerRegistry* registry, const Clock* clock)
      : store_(store), registry_(registry), clock_(clock) {}
  // The model's id when it is new, or "".
  std::string NewsOf(const v1::Model& model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  jobs::JobStore* const store_;
  const WorkerRegistry* const registry_;
  const Clock* const clock_;
  mutable absl::Mutex mu_;
  std::map<std::string, v1::Model> rows_ ABSL_GUARDED_BY(mu_);          // by id
  std::map<std::string, absl::Duration> deleted_ ABSL_GUARDED_BY(mu_);  // monotonic, by id
};

}  // namespace walsh::fleet
