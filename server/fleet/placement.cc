#include "server/fleet/placement.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"

namespace walsh::fleet {
namespace {

constexpr absl::Duration kLoadingRetry = absl::Seconds(2);
constexpr absl::Duration kNoWorkerRetry = absl::Seconds(5);

// How useful a state is to somebody who wants answers.
int Usefulness(v1::Model::State state) {
  switch (state) {
    case v1::Model::READY:
      return 5;
    case v1::Model::LOADING:
      return 4;
    case v1::Model::DRAINING:
      return 3;
    case v1::Model::UNLOADING:
      return 2;
    case v1::Model::FAILED:
      return 1;
    default:
      return 0;
  }
}

// The one that comes first by usefulness, then load, then worker id.
const Replica* Best(std::span<const Replica> replicas) {
  const auto it =
      std::min_element(replicas.begin(), replicas.end(), [](const Replica& a, const Replica& b) {
        const int usefulness_a = Usefulness(a.model.state());
        const int usefulness_b = Usefulness(b.model.state());
        if (usefulness_a != usefulness_b) return usefulness_a > usefulness_b;
        if (a.load != b.load) return a.load < b.load;
        return a.worker.worker_id < b.worker.worker_id;
      });
  return it == replicas.end() ? nullptr : &*it;
}

absl::Status Unavailable(std::string message, std::string_view reason, absl::Duration retry) {
  absl::Status status = absl::UnavailableError(message);
  SetErrorInfo(status, reason);
  SetRetryDelay(status, retry);
  return status;
}

absl::Status NoWorkerHas(const std::string& model_id) {
  return Unavailable(absl::StrCat("no connected worker has model '", model_id, "'"), "NO_WORKER",
                     kNoWorkerRetry);
}

}  // namespace

absl::StatusOr<WorkerAddress> ChooseForEvaluation(const std::string& model_id,
                                                  std::span<const Replica> replicas) {
  const auto order = [](const Replica& replica) {
    return std::tie(replica.is_draining, replica.evaluations, replica.load,
                    replica.worker.worker_id);
  };
  const auto it =
      std::min_element(replicas.begin(), replicas.end(),
                       [&](const Replica& a, const Replica& b) { return order(a) < order(b); });
  if (it == replicas.end()) return NoWorkerHas(model_id);
  if (it->is_draining) {
    return Unavailable(absl::StrCat("the workers that have model '", model_id, "' are draining"),
                       "NO_WORKER", kNoWorkerRetry);
  }
  return it->worker;
}

absl::Status NoWorker() {
  return Unavailable("no worker is connected", "NO_WORKER", kNoWorkerRetry);
}

absl::StatusOr<WorkerAddress> ChooseForGeneration(const std::string& model_id,
                                                  std::span<const Replica> replicas) {
  const Replica* best = Best(replicas);
  if (best == nullptr) return NoWorkerHas(model_id);
  switch (best->model.state()) {
    case v1::Model::READY:
      return best->worker;
    case v1::Model::LOADING:
      return Unavailable(absl::StrCat("model '", model_id, "' is being loaded"), "MODEL_LOADING",
                         kLoadingRetry);
    case v1::Model::DRAINING:
    case v1::Model::UNLOADING:
      return Unavailable(absl::StrCat("model '", model_id, "' is being unloaded"), "MODEL_DRAINING",
                         kLoadingRetry);
    default:
      break;
  }
  absl::Status status = absl::FailedPreconditionError(
      absl::StrCat("model '", model_id, "' is ", v1::Model::State_Name(best->model.state()),
                   ": load it first (`walsh models load ", model_id, "`)"));
  SetErrorInfo(status, "MODEL_NOT_LOADED", {{"model", model_id}});
  SetPreconditionFailure(status, "MODEL_STATE", ModelName(model_id),
                         v1::Model::State_Name(best->model.state()));
  return status;
}

const Replica* ChooseForLoad(std::span<const Replica> replicas) {
  const auto rank = [](const Replica& replica) {
    switch (replica.model.state()) {
      case v1::Model::READY:
        return 0;
      case v1::Model::LOADING:
        return 1;
      case v1::Model::FAILED:
        return 3;  // where it did not go before
      default:
        return 2;
    }
  };
  const auto order = [&](const Replica& replica) {
    return std::make_tuple(replica.is_draining, rank(replica), replica.load,
                           replica.worker.worker_id);
  };
  const auto it =
      std::min_element(replicas.begin(), replicas.end(),
                       [&](const Replica& a, const Replica& b) { return order(a) < order(b); });
  return it == replicas.end() ? nullptr : &*it;
}

v1::Model Merge(const v1::Model& known, std::span<const Replica> replicas) {
  const Replica* best = Best(replicas);
  v1::Model merged = best == nullptr ? known : best->model;
  merged.set_name(known.name());
  if (merged.quantization_job().empty()) merged.set_quantization_job(known.quantization_job());
  if (!merged.has_create_time() && known.has_create_time()) {
    *merged.mutable_create_time() = known.create_time();
  }
  if (best == nullptr || merged.state() == v1::Model::STATE_UNSPECIFIED) {
    merged.set_state(v1::Model::UNLOADED);
  }
  merged.set_worker(IsLoaded(merged.state()) ? WorkerName(best->worker.worker_id) : "");
  return merged;
}

bool IsLoaded(v1::Model::State state) {
  return state == v1::Model::READY || state == v1::Model::LOADING || state == v1::Model::DRAINING ||
         state == v1::Model::UNLOADING;
}

}  // namespace walsh::fleet
