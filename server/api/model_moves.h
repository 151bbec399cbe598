// Loading, unloading and deleting models on the workers that have them. A model that none has is
// loaded by one with an artifact store, which may have it; what is deleted is deleted there, too.
//
// Nothing here blocks; `done` is called once, on a thread that may wait for the disk. A cancelled
// move no longer waits for the worker, which still ends what it has begun: its heartbeats tell.
//
// Errors:  NOT_FOUND an unknown model, or an alias of one (IS_ALIAS); UNAVAILABLE (NO_WORKER) no
//          connected worker has it; FAILED_PRECONDITION deleting a loaded model without force, or
//          one that an alias points at; CANCELLED; those of the worker.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/grpc_cancellation.h"
#include "server/api/core.h"

namespace walsh::api {

using Done = std::function<void(absl::Status)>;

// How long a move may take, and what ends it early.
struct MoveLimits {
  absl::Duration timeout;  // of each call to a worker
  std::shared_ptr<Cancellation> cancellation;
};

// UNAVAILABLE (NO_WORKER): the model is known, and no connected worker has it.
absl::Status ModelNotHere(const std::string& id);

// Loads the model on one worker; OK at once where one has it READY.
void LoadModel(Core* core, const std::string& id, const MoveLimits& limits, Done done);
// Unloads it on every worker. None is asked before the requests that went there have had the time
// to arrive: what was accepted is answered.
void UnloadModel(Core* core, const std::string& id, const MoveLimits& limits, Done done);
// Removes the artifact on every connected worker, then the record. With `force` it is unloaded
// first, and a model that no connected worker has loses its record. A model without a record is
// removed where only the artifact store has it; ALREADY_EXISTS (NAME_TAKEN) while one is made.
void DeleteModel(Core* core, const std::string& id, bool force, const MoveLimits& limits,
                 Done done);

}  // namespace walsh::api
