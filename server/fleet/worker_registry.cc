#include "server/fleet/worker_registry.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/utf8.h"

namespace walsh::fleet {
namespace {

// Ids appear in names, logs and messages.
bool IsWorkerId(const std::string& id) {
  return !id.empty() && id.size() <= limits::kWorkerIdBytesMax &&
         std::all_of(id.begin(), id.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

absl::Status Unknown(const std::string& worker_id) {
  absl::Status status = absl::NotFoundError(
      absl::StrCat("worker '", ReplaceInvalidUtf8(worker_id.substr(0, limits::kWorkerIdBytesMax)),
                   "' is not registered here: register again"));
  SetErrorInfo(status, "WORKER_UNKNOWN");
  return status;
}

}  // namespace

void WorkerRegistry::See(Entry* entry) {
  entry->last_seen = clock_->Monotonic();
  const int64_t nanos = absl::ToUnixNanos(clock_->Now());
  entry->worker.mutable_last_heartbeat()->set_seconds(nanos / 1'000'000'000);
  entry->worker.mutable_last_heartbeat()->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
  if (entry->worker.state() == v1::Worker::OFFLINE) {
    WALSH_LOG(Info, "worker is back", {"worker", entry->worker.name()});
    entry->worker.set_state(v1::Worker::ONLINE);
  }
}

void WorkerRegistry::SetModels(const google::protobuf::RepeatedPtrField<v1::Model>& models,
                               int64_t revision, Entry* entry) {
  std::erase_if(entry->models,
                [&](const auto& known) { return known.second.revision() <= revision; });
  for (const v1::Model& model : models) {
    const absl::StatusOr<std::string> id = ParseModelName("models", model.name());
    // What is still there is newer than the list.
    if (id.ok()) entry->models.try_emplace(*id, model);
  }
}

absl::StatusOr<std::vector<std::string>> WorkerRegistry::Register(
    const internal_v1::RegisterRequest& request) {
  if (!IsWorkerId(request.worker_id())) {
    return InvalidField("worker_id", absl::StrCat("must be 1 to ", limits::kWorkerIdBytesMax,
                                                  " letters, digits, '-', '_' or '.'"));
  }
  if (request.address().empty()) return InvalidField("address", "is missing");
  const absl::MutexLock lock(&mu_);
  std::vector<std::string> replaced;
  for (auto it = workers_.begin(); it != workers_.end();) {
    const bool is_replaced =
        it->second.address == request.address() && it->first != request.worker_id();
    if (is_replaced) replaced.push_back(it->first);
    it = is_replaced ? workers_.erase(it) : std::next(it);
  }
  if (!replaced.empty()) last_departure_ = clock_->Monotonic();
  Entry& entry = workers_[request.worker_id()];
  entry.address = request.address();
  entry.has_artifact_store = request.has_artifact_store();
  entry.worker.set_name(WorkerName(request.worker_id()));
  const bool is_draining = request.draining() || entry.worker.state() == v1::Worker::DRAINING;
  entry.worker.set_state(is_draining ? v1::Worker::DRAINING : v1::Worker::ONLINE);
  entry.worker.set_version(ReplaceInvalidUtf8(request.version()));
  entry.worker.set_device(ReplaceInvalidUtf8(request.device()));
  entry.worker.set_memory_bytes_total(request.memory_bytes_total());
  entry.models.clear();
  SetModels(request.models(), /*revision=*/0, &entry);
  See(&entry);
  return replaced;
}

absl::Status WorkerRegistry::Heartbeat(const internal_v1::HeartbeatRequest& request) {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(request.worker_id());
  if (it == workers_.end()) return Unknown(request.worker_id());
  Entry& entry = it->second;
  See(&entry);
  const bool is_draining = request.draining() || entry.worker.state() == v1::Worker::DRAINING;
  entry.worker.set_state(is_draining ? v1::Worker::DRAINING : v1::Worker::ONLINE);
  entry.worker.set_running_job(request.job_name());
  entry.worker.set_requests_running(std::max(0, request.requests_running()));
  entry.worker.set_requests_waiting(std::max(0, request.requests_waiting()));
  entry.worker.set_memory_bytes_free(request.memory_bytes_free());
  SetModels(request.models(), request.models_revision(), &entry);
  return absl::OkStatus();
}

absl::Status WorkerRegistry::Touch(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  if (it == workers_.end()) return Unknown(worker_id);
  See(&it->second);
  return absl::OkStatus();
}

absl::Status WorkerRegistry::Drain(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  if (it == workers_.end()) return Unknown(worker_id);
  See(&it->second);
  it->second.worker.set_state(v1::Worker::DRAINING);
  return absl::OkStatus();
}

void WorkerRegistry::Deregister(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  if (workers_.erase(worker_id) > 0) last_departure_ = clock_->Monotonic();
}

std::vector<std::string> WorkerRegistry::Tick() {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  std::vector<std::string> went_offline;
  for (auto it = workers_.begin(); it != workers_.end();) {
    const absl::Duration silence = now - it->second.last_seen;
    v1::Worker& worker = it->second.worker;
    if (silence >= options_.offline_after && worker.state() != v1::Worker::OFFLINE) {
      WALSH_LOG(Warning, "worker is offline", {"worker", worker.name()},
                {"silent_seconds", absl::ToDoubleSeconds(silence)});
      worker.set_state(v1::Worker::OFFLINE);
      worker.clear_running_job();
      worker.clear_requests_running();
      worker.clear_requests_waiting();
      went_offline.push_back(it->first);
      last_departure_ = now;
    }
    it = silence >= options_.forget_after ? workers_.erase(it) : std::next(it);
  }
  return went_offline;
}

std::vector<v1::Worker> WorkerRegistry::List() const {
  const absl::MutexLock lock(&mu_);
  std::vector<v1::Worker> workers;
  for (const auto& [id, entry] : workers_) {
    v1::Worker& worker = workers.emplace_back(entry.worker);
    if (worker.state() == v1::Worker::OFFLINE) continue;
    for (const auto& [model_id, model] : entry.models) {
      if (IsLoaded(model.state())) worker.add_models(ModelName(model_id));
    }
  }
  return workers;
}

// The larger of what the worker said and what we know: its figure is up to a heartbeat old, and it
// may have other clients.
int WorkerRegistry::Load(const std::string& worker_id, const Entry& entry) const {
  return std::max(entry.worker.requests_running() + entry.worker.requests_waiting(),
                  RequestsLocked(worker_id));
}

Replica WorkerRegistry::ToReplica(const std::string& worker_id, const Entry& entry,
                                  const std::string& model_id, const v1::Model& model) const {
  const Begun& begun = BegunWith(worker_id);
  Replica replica = {.worker = {.worker_id = worker_id, .address = entry.address},
                     .model = model,
                     .load = Load(worker_id, entry),
                     .evaluations = begun.evaluations,
                     .is_draining = entry.worker.state() == v1::Worker::DRAINING};
  // A draining worker finishes what it has and takes nothing new; so does a closed model.
  const bool is_closed = replica.is_draining || begun.closings.contains(model_id);
  if (is_closed && model.state() == v1::Model::READY) {
    replica.model.set_state(v1::Model::DRAINING);
  }
  return replica;
}

std::vector<Replica> WorkerRegistry::Replicas(const std::string& model_id) const {
  const absl::MutexLock lock(&mu_);
  return ReplicasOf(model_id);
}

std::vector<Replica> WorkerRegistry::ReplicasOf(const std::string& model_id) const {
  std::vector<Replica> replicas;
  for (const auto& [id, entry] : workers_) {
    if (entry.worker.state() == v1::Worker::OFFLINE) continue;
    const auto it = entry.models.find(model_id);
    if (it != entry.models.end()) replicas.push_back(ToReplica(id, entry, model_id, it->second));
  }
  return replicas;
}

std::map<std::string, std::vector<Replica>> WorkerRegistry::AllReplicas() const {
  const absl::MutexLock lock(&mu_);
  std::map<std::string, std::vector<Replica>> replicas;
  for (const auto& [id, entry] : workers_) {
    if (entry.worker.state() == v1::Worker::OFFLINE) continue;
    for (const auto& [model_id, model] : entry.models) {
      replicas[model_id].push_back(ToReplica(id, entry, model_id, model));
    }
  }
  return replicas;
}

std::vector<WorkerAddress> WorkerRegistry::Online() const {
  return OnlineWhere([](const Entry&) { return true; });
}

std::vector<WorkerAddress> WorkerRegistry::WithArtifactStore() const {
  return OnlineWhere([](const Entry& entry) { return entry.has_artifact_store; });
}

std::vector<WorkerAddress> WorkerRegistry::OnlineWhere(
    absl::FunctionRef<bool(const Entry&)> condition) const {
  const absl::MutexLock lock(&mu_);
  std::vector<std::pair<int, WorkerAddress>> by_load;
  for (const auto& [id, entry] : workers_) {
    if (entry.worker.state() != v1::Worker::ONLINE || !condition(entry)) continue;
    by_load.emplace_back(Load(id, entry), WorkerAddress{.worker_id = id, .address = entry.address});
  }
  std::stable_sort(by_load.begin(), by_load.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<WorkerAddress> online;
  for (auto& [load, worker] : by_load) online.push_back(std::move(worker));
  return online;
}

std::optional<std::set<std::string>> WorkerRegistry::TakingJobs() const {
  const absl::MutexLock lock(&mu_);
  if (clock_->Monotonic() - last_departure_ < options_.offline_after) return std::nullopt;
  std::set<std::string> names;
  for (const auto& [id, entry] : workers_) {
    if (entry.worker.state() == v1::Worker::DRAINING) return std::nullopt;
    if (entry.worker.state() == v1::Worker::ONLINE) names.insert(entry.worker.name());
  }
  return names;
}

bool WorkerRegistry::IsDraining(const std::string& worker_id) const {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  return it != workers_.end() && it->second.worker.state() == v1::Worker::DRAINING;
}

std::set<std::string> WorkerRegistry::Connected() const {
  const absl::MutexLock lock(&mu_);
  std::set<std::string> ids;
  for (const auto& [id, entry] : workers_) {
    if (entry.worker.state() != v1::Worker::OFFLINE) ids.insert(id);
  }
  return ids;
}

void WorkerRegistry::SetModel(const std::string& worker_id, const v1::Model& model) {
  const absl::StatusOr<std::string> id = ParseModelName("model", model.name());
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  if (!id.ok() || it == workers_.end()) return;
  v1::Model& known = it->second.models[*id];
  if (known.revision() <= model.revision()) known = model;
}

v1::Model* WorkerRegistry::FindModel(const std::string& worker_id, const std::string& model_id) {
  const auto worker = workers_.find(worker_id);
  if (worker == workers_.end()) return nullptr;
  const auto model = worker->second.models.find(model_id);
  return model == worker->second.models.end() ? nullptr : &model->second;
}

void WorkerRegistry::SetModelState(const std::string& worker_id, const std::string& model_id,
                                   v1::Model::State state) {
  const absl::MutexLock lock(&mu_);
  if (v1::Model* model = FindModel(worker_id, model_id)) model->set_state(state);
}

void WorkerRegistry::ReplaceModelState(const std::string& worker_id, const std::string& model_id,
                                       v1::Model::State from, v1::Model::State to) {
  const absl::MutexLock lock(&mu_);
  v1::Model* model = FindModel(worker_id, model_id);
  if (model != nullptr && model->state() == from) model->set_state(to);
}

void WorkerRegistry::RemoveModel(const std::string& worker_id, const std::string& model_id) {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  if (it != workers_.end()) it->second.models.erase(model_id);
}

void WorkerRegistry::SetRunningJob(const std::string& worker_id, const std::string& job_name) {
  const absl::MutexLock lock(&mu_);
  const auto it = workers_.find(worker_id);
  if (it != workers_.end()) it->second.worker.set_running_job(job_name);
}

absl::StatusOr<WorkerAddress> WorkerRegistry::BeginRequest(const std::string& model_id,
                                                           const std::set<std::string>& refused) {
  const absl::MutexLock lock(&mu_);
  std::vector<Replica> replicas = ReplicasOf(model_id);
  std::erase_if(replicas, [&](const Replica& r) { return refused.contains(r.worker.worker_id); });
  absl::StatusOr<WorkerAddress> worker = ChooseForGeneration(model_id, replicas);
  if (worker.ok()) ++begun_[worker->worker_id].requests[model_id];
  return worker;
}

void WorkerRegistry::EndRequest(const std::string& worker_id, const std::string& model_id) {
  const absl::MutexLock lock(&mu_);
  CountDown(worker_id, &Begun::requests, model_id);
}

int WorkerRegistry::RequestsOf(const std::string& worker_id, const std::string& model_id) const {
  const absl::MutexLock lock(&mu_);
  const std::map<std::string, int>& requests = BegunWith(worker_id).requests;
  const auto of_model = requests.find(model_id);
  return of_model == requests.end() ? 0 : of_model->second;
}

int WorkerRegistry::RequestsOf(const std::string& worker_id) const {
  const absl::MutexLock lock(&mu_);
  return RequestsLocked(worker_id);
}

int WorkerRegistry::RequestsLocked(const std::string& worker_id) const {
  int n_requests = 0;
  for (const auto& [model_id, n] : BegunWith(worker_id).requests) n_requests += n;
  return n_requests;
}

void WorkerRegistry::CloseModel(const std::string& worker_id, const std::string& model_id) {
  const absl::MutexLock lock(&mu_);
  ++begun_[worker_id].closings[model_id];
}

void WorkerRegistry::OpenModel(const std::string& worker_id, const std::string& model_id) {
  const absl::MutexLock lock(&mu_);
  CountDown(worker_id, &Begun::closings, model_id);
}

void WorkerRegistry::BeginEvaluation(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  ++begun_[worker_id].evaluations;
}

void WorkerRegistry::EndEvaluation(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  Begun& begun = begun_[worker_id];
  --begun.evaluations;
  if (begun.empty()) begun_.erase(worker_id);
}

const WorkerRegistry::Begun& WorkerRegistry::BegunWith(const std::string& worker_id) const {
  static const Begun& none = *new Begun;
  const auto it = begun_.find(worker_id);
  return it == begun_.end() ? none : it->second;
}

void WorkerRegistry::CountDown(const std::string& worker_id,
                               std::map<std::string, int> Begun::*counts,
                               const std::string& model_id) {
  Begun& begun = begun_[worker_id];
  int& count = (begun.*counts)[model_id];
  if (--count == 0) (begun.*counts).erase(model_id);
  if (begun.empty()) begun_.erase(worker_id);
}

}  // namespace walsh::fleet
