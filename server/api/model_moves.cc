#include "server/api/model_moves.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "server/api/arrival.h"
#include "server/api/call.h"
#include "server/fleet/placement.h"

namespace walsh::api {
namespace {

using fleet::Replica;

// Goes on with `next` on the executor; a full executor is an error like any other.
void Continue(Core* core, const Done& done, std::function<void()> next) {
  if (!core->executor->Post(std::move(next))) {
    done(Overloaded());
  }
}

// Whether the worker goes on although nobody waits for its answer any more.
bool StillMoves(const absl::Status& status) {
  return absl::IsCancelled(status) || absl::IsDeadlineExceeded(status);
}

// The model's state after a failed move: as before, unless the worker goes on or has said otherwise
// meanwhile.
void RestoreState(Core* core, const Replica& replica, const std::string& id,
                  v1::Model::State moving, const absl::Status& status) {
  if (StillMoves(status)) return;
  core->registry->ReplaceModelState(replica.worker.worker_id, id, moving, replica.model.state());
}

// What is done to one replica: starts a call to its worker.
using Step = std::function<void(const Replica&, Done)>;

// One replica after the other, up to the first error.
void ForEach(Core* core, std::shared_ptr<std::vector<Replica>> replicas, size_t index,
             const Step& step, const Done& done) {
  if (index == replicas->size()) return done(absl::OkStatus());
  step((*replicas)[index], [=](const absl::Status& status) {
    if (!status.ok()) return done(status);
    Continue(core, done, [=] { ForEach(core, replicas, index + 1, step, done); });
  });
}

void UnloadReplicas(Core* core, const std::string& id, std::vector<Replica> replicas,
                    const MoveLimits& limits, const Done& done) {
  std::erase_if(replicas, [](const Replica& r) { return !fleet::IsLoaded(r.model.state()); });
  const Step unload = [=](const Replica& replica, const Done& unloaded) {
    const std::string& worker_id = replica.worker.worker_id;
    core->registry->CloseModel(worker_id, id);
    core->registry->SetModelState(worker_id, id, v1::Model::DRAINING);
    const auto answered = [=](const absl::StatusOr<v1::Model>& model) {
      if (model.ok()) {
        core->registry->SetModel(replica.worker.worker_id, *model);
      } else {
        RestoreState(core, replica, id, v1::Model::DRAINING, model.status());
      }
      core->registry->OpenModel(replica.worker.worker_id, id);
      unloaded(model.status());
    };
    const Done not_asked = [=](const absl::Status& status) {
      core->registry->ReplaceModelState(replica.worker.worker_id, id, v1::Model::DRAINING,
                                        replica.model.state());
      core->registry->OpenModel(replica.worker.worker_id, id);
      unloaded(status);
    };
    const absl::Duration start = core->clock->Monotonic();
    const auto n_sent = [=] { return core->registry->RequestsOf(worker_id, id); };
    AfterArrival(core, n_sent, limits.timeout, limits.cancellation,
                 [=](const absl::Status& arrived) {
                   if (!arrived.ok()) return not_asked(arrived);
                   const absl::Duration left = limits.timeout - (core->clock->Monotonic() - start);
                   core->clients->Get(replica.worker)
                       ->UnloadModel(ModelName(id), left, limits.cancellation, answered);
                 });
  };
  ForEach(core, std::make_shared<std::vector<Replica>>(std::move(replicas)), 0, unload, done);
}

// As the first word of a worker that has no artifact of the model, but a store that may.
Replica OfStore(const fleet::WorkerAddress& worker, const std::string& id) {
  Replica replica{.worker = worker};
  replica.model.set_name(ModelName(id));
  replica.model.set_state(v1::Model::UNLOADED);
  return replica;
}

// Adds a worker that removes the model from the artifact store, unless one of them does.
void AddStore(Core* core, const std::string& id, std::vector<Replica>& replicas) {
  const std::vector<fleet::WorkerAddress> workers = core->registry->WithArtifactStore();
  const bool has_one = std::any_of(workers.begin(), workers.end(), [&](const auto& worker) {
    return std::any_of(replicas.begin(), replicas.end(), [&](const Replica& replica) {
      return replica.worker.worker_id == worker.worker_id;
    });
  });
  if (!has_one && !workers.empty()) replicas.push_back(OfStore(workers.front(), id));
}

void DeleteReplicas(Core* core, const std::string& id, std::vector<Replica> replicas,
                    const MoveLimits& limits, const Done& done) {
  const Step remove = [=](const Replica& replica, const Done& removed) {
    core->clients->Get(replica.worker)
        ->DeleteModel(ModelName(id), limits.timeout, limits.cancellation,
                      [=](const absl::StatusOr<google::protobuf::Empty>& answer) {
                        // Workers may share a store: the first has deleted it for all.
                        const bool is_gone = answer.ok() || absl::IsNotFound(answer.status());
                        if (is_gone) core->registry->RemoveModel(replica.worker.worker_id, id);
                        removed(is_gone ? absl::OkStatus() : answer.status());
                      });
  };
  ForEach(core, std::make_shared<std::vector<Replica>>(std::move(replicas)), 0, remove,
          [=](const absl::Status& status) {
            if (!status.ok()) return done(status);
            Continue(core, done, [=] { done(core->catalog->Forget(id)); });
          });
}

// A model that no row names, `unknown`: the artifact store may have it, of a job that ended before
// its worker could say that it is published, and no other could have its name.
void DeleteFromStore(Core* core, const std::string& id, const absl::Status& unknown,
                     const MoveLimits& limits, const Done& done) {
  const std::vector<fleet::WorkerAddress> workers = core->registry->WithArtifactStore();
  if (workers.empty()) return done(unknown);
  // One that a job or an import is making may be there already.
  if (absl::Status taken = core->queue->CheckNamesAreFree("", id); !taken.ok()) return done(taken);
  if (absl::Status taken = core->catalog->BeginImport(id); !taken.ok()) return done(taken);
  core->clients->Get(workers.front())
      ->DeleteModel(ModelName(id), limits.timeout, limits.cancellation,
                    [=](const absl::StatusOr<google::protobuf::Empty>& answer) {
                      core->catalog->EndImport(id, /*is_published=*/false);
                      const absl::Status status =
                          absl::IsNotFound(answer.status()) ? unknown : answer.status();
                      Continue(core, done, [=] { done(status); });
                    });
}

}  // namespace

absl::Status ModelNotHere(const std::string& id) {
  absl::Status status =
      absl::UnavailableError(absl::StrCat("no connected worker has model '", id, "'"));
  SetErrorInfo(status, "NO_WORKER");
  SetRetryDelay(status, absl::Seconds(5));
  return status;
}

void LoadModel(Core* core, const std::string& id, const MoveLimits& limits, Done done) {
  if (absl::Status known = core->catalog->CheckIsModel(id); !known.ok()) return done(known);
  std::vector<Replica> replicas = core->registry->Replicas(id);
  std::erase_if(replicas, [](const Replica& replica) { return replica.is_draining; });
  const bool is_here = !replicas.empty();
  if (!is_here) {
    const std::vector<fleet::WorkerAddress> workers = core->registry->WithArtifactStore();
    if (!workers.empty()) replicas.push_back(OfStore(workers.front(), id));
  }
  const Replica* chosen = fleet::ChooseForLoad(replicas);
  if (chosen == nullptr) return done(ModelNotHere(id));
  if (chosen->model.state() == v1::Model::READY) return done(absl::OkStatus());
  const std::string& worker_id = chosen->worker.worker_id;
  core->registry->SetModelState(worker_id, id, v1::Model::LOADING);
  core->clients->Get(chosen->worker)
      ->LoadModel(ModelName(id), limits.timeout, limits.cancellation,
                  [=, replica = *chosen](const absl::StatusOr<v1::Model>& model) {
                    if (model.ok()) {
                      core->registry->SetModel(replica.worker.worker_id, *model);
                    } else {
                      RestoreState(core, replica, id, v1::Model::LOADING, model.status());
                    }
                    // The store does not have it either.
                    const bool is_nowhere = !is_here && absl::IsNotFound(model.status());
                    const absl::Status status = is_nowhere ? ModelNotHere(id) : model.status();
                    Continue(core, done, [=] { done(status); });
                  });
}

void UnloadModel(Core* core, const std::string& id, const MoveLimits& limits, Done done) {
  if (absl::Status known = core->catalog->CheckIsModel(id); !known.ok()) return done(known);
  UnloadReplicas(core, id, core->registry->Replicas(id), limits, done);
}

void DeleteModel(Core* core, const std::string& id, bool force, const MoveLimits& limits,
                 Done done) {
  if (absl::Status known = core->catalog->CheckIsModel(id); !known.ok()) {
    if (ErrorReason(known) == "IS_ALIAS") return done(known);
    return DeleteFromStore(core, id, known, limits, done);
  }
  std::vector<Replica> replicas = core->registry->Replicas(id);
  AddStore(core, id, replicas);
  if (replicas.empty() && !force) {
    absl::Status status = absl::FailedPreconditionError(
        absl::StrCat("no connected worker has model '", id,
                     "'; force removes its record, and the artifact stays where it is"));
    SetErrorInfo(status, "NO_WORKER");
    SetPreconditionFailure(status, "MODEL_HOST", ModelName(id), "no connected worker has it");
    return done(status);
  }
  for (const Replica& replica : replicas) {
    if (force || !fleet::IsLoaded(replica.model.state())) continue;
    absl::Status status = absl::FailedPreconditionError(
        absl::StrCat("model '", id, "' is ", v1::Model::State_Name(replica.model.state()),
                     ": unload it first, or use force"));
    SetErrorInfo(status, "MODEL_LOADED");
    SetPreconditionFailure(status, "MODEL_STATE", ModelName(id),
                           v1::Model::State_Name(replica.model.state()));
    return done(status);
  }
  if (absl::Status begun = core->catalog->BeginDelete(id); !begun.ok()) return done(begun);
  const Done ended = [=](const absl::Status& status) {
    core->catalog->EndDelete(id);
    done(status);
  };
  UnloadReplicas(core, id, replicas, limits, [=](const absl::Status& status) {
    if (!status.ok()) return ended(status);
    Continue(core, ended, [=] { DeleteReplicas(core, id, replicas, limits, ended); });
  });
}

}  // namespace walsh::api
