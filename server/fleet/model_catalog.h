// The published models and their aliases: rows of the store, joined with what the workers say.
//
// A model is known from the moment that its job has succeeded, or that a worker shows up with it,
// and until it is deleted; where it is loaded is the workers' word alone.
//
// An alias points at one model, which is in the catalog for as long as it does. What is asked for
// by an alias goes to the model that it points at in that moment: a request is resolved once, when
// it is accepted, so that a switch changes nothing of those before it. Resolving and sending are
// one step (ForModel): once SetAlias has returned, no request goes to the model of before.
//
// Errors:  NOT_FOUND; those of the store.
// Threads: safe. Learn, Forget, SetAlias and DeleteAlias may block on the disk, BeginDelete for
//          these two.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
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

  // Points an alias at a model and stores that before requests see it.
  //   NOT_FOUND            no such model
  //   ALREADY_EXISTS       (NAME_TAKEN) a model, one that a job makes or one that is being imported
  //                        has the alias's name
  //   FAILED_PRECONDITION  `model` is an alias itself (ALIAS_OF_ALIAS), is being deleted
  //                        (MODEL_DELETING), or is not READY (MODEL_NOT_LOADED) without `force`
  //   RESOURCE_EXHAUSTED   limits::kAliasesMax are there (TOO_MANY_ALIASES)
  absl::StatusOr<v1::ModelAlias> SetAlias(const std::string& alias, const std::string& model,
                                          bool force);
  absl::Status DeleteAlias(const std::string& alias);
  // The models that aliases point at, by alias.
  std::map<std::string, std::string> Aliases() const;
  // Between these two no alias can be pointed at the model. FAILED_PRECONDITION (MODEL_HAS_ALIAS)
  // when one points at it already.
  absl::Status BeginDelete(const std::string& id);
  void EndDelete(const std::string& id);

  // Between these two no alias and no other import gets the name, for an import or for the deletion
  // of what is in the way of one. ALREADY_EXISTS (NAME_TAKEN): a
  // model, an alias or an import has it. A model that was published keeps it until a heartbeat of
  // its worker has brought it.
  absl::Status BeginImport(const std::string& id);
  void EndImport(const std::string& id, bool is_published);

  // The id of the model that a request means: that of an alias, else `name` itself. A model that a
  // worker brought under an alias's name is not reached by it.
  absl::StatusOr<std::string> Resolve(const std::string& name) const;
  // Calls `use` with that id while no alias can be pointed elsewhere; its status, or NOT_FOUND.
  // `use` must not wait, nor call the catalog.
  absl::Status ForModel(const std::string& name,
                        absl::FunctionRef<absl::Status(const std::string& id)> use) const;
  // OK for a model, by its own name; NOT_FOUND says so of an alias.
  absl::Status CheckIsModel(const std::string& id) const;
  bool Knows(const std::string& id) const;
  absl::StatusOr<v1::Model> Get(const std::string& id) const;
  // Models with an id above `after`, by id, at most `n_max`.
  std::vector<v1::Model> List(const std::string& after, int n_max) const;
  // Every model as it is stored, without what workers say.
  std::vector<v1::Model> Rows() const;
  // Every model with its state.
  std::map<std::string, v1::Model::State> States() const;

  // What of a model is the same wherever it is: the row of the store.
  static v1::Model Row(const v1::Model& model);

 private:
  ModelCatalog(jobs::JobStore* store, const WorkerRegistry* registry, const Clock* clock)
      : store_(store), registry_(registry), clock_(clock) {}
  // The model's id when it is new, or "".
  std::string NewsOf(const v1::Model& model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::StatusOr<std::string> ResolveLocked(const std::string& name) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsReserved(const std::string& name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What an alias's row would break; then its name or its target is refused.
  absl::Status CheckAlias(const std::string& alias, const std::string& model, bool force) const;
  // Ids of the aliases of each model.
  std::map<std::string, std::vector<std::string>> AliasesByModel() const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  jobs::JobStore* const store_;
  const WorkerRegistry* const registry_;
  const Clock* const clock_;
  // Held while an alias is stored, so that store and memory change in one order; before mu_.
  absl::Mutex alias_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  mutable absl::Mutex mu_;
  std::map<std::string, v1::Model> rows_ ABSL_GUARDED_BY(mu_);          // by id
  std::map<std::string, absl::Duration> deleted_ ABSL_GUARDED_BY(mu_);  // monotonic, by id
  std::map<std::string, std::string> aliases_ ABSL_GUARDED_BY(mu_);     // models, by alias
  std::map<std::string, int> deletions_ ABSL_GUARDED_BY(mu_);           // that go on, by id
  // Names of imports and of the alias that is being stored, and until when they are (monotonic).
  std::map<std::string, absl::Duration> reserved_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh::fleet
