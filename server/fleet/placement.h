// Which worker answers for a model: pure decisions over what the registry knows.
//
// Errors of ChooseForGeneration:
//   UNAVAILABLE          it is being loaded (ErrorInfo MODEL_LOADING), is draining or its worker is
//                        gone (NO_WORKER); all with RetryInfo
//   FAILED_PRECONDITION  it is not loaded (MODEL_NOT_LOADED)
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "walsh/v1/model.pb.h"

namespace walsh::fleet {

struct WorkerAddress {
  std::string worker_id;
  std::string address;  // host:port
};

// A model on one worker that is there.
struct Replica {
  WorkerAddress worker;
  v1::Model model;           // with the state on this worker
  int load = 0;              // requests running and waiting
  int evaluations = 0;       // that this coordinator has sent there and that run
  bool is_draining = false;  // the worker takes nothing new
};

// The READY replica with the least load.
absl::StatusOr<WorkerAddress> ChooseForGeneration(const std::string& model_id,
                                                  std::span<const Replica> replicas);

// The worker that evaluates a model: loaded or not, its artifact is what counts. One with the
// fewest evaluations, since a worker takes few, and of these the one with the least load.
// UNAVAILABLE (NO_WORKER) without any that is not draining.
absl::StatusOr<WorkerAddress> ChooseForEvaluation(const std::string& model_id,
                                                  std::span<const Replica> replicas);

// The replica to load: one that is READY or loading already, else the least busy, and one where it
// FAILED or whose worker is draining only when there is no other.
const Replica* ChooseForLoad(std::span<const Replica> replicas);

// What clients see of a model that several workers have: the most useful state, and who is in it.
// No replica: UNLOADED. `known` is what the store has.
v1::Model Merge(const v1::Model& known, std::span<const Replica> replicas);

// Loaded or on the way there or away.
bool IsLoaded(v1::Model::State state);

absl::Status NoWorker();

}  // namespace walsh::fleet
