#include "server/fleet/model_catalog.h"

#include <utility>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh::fleet {
namespace {

// Longer than any heartbeat is on its way.
constexpr absl::Duration kDeletedIgnored = absl::Minutes(1);

}  // namespace

absl::StatusOr<std::unique_ptr<ModelCatalog>> ModelCatalog::Open(jobs::JobStore* store,
                                                                 const WorkerRegistry* registry,
                                                                 const Clock* clock) {
  std::unique_ptr<ModelCatalog> catalog(new ModelCatalog(store, registry, clock));
  WALSH_ASSIGN_OR_RETURN(const std::vector<v1::Model> models, store->Models());
  for (const v1::Model& model : models) catalog->Publish(model);
  return catalog;
}

v1::Model ModelCatalog::Row(const v1::Model& model) {
  v1::Model row = model;
  row.clear_state();
  row.clear_worker();
  row.clear_memory_bytes();
  row.clear_error();
  row.clear_revision();
  return row;
}

std::string ModelCatalog::NewsOf(const v1::Model& model) const {
  const absl::StatusOr<std::string> id = ParseModelName("model", model.name());
  if (!id.ok()) return "";
  const auto deleted = deleted_.find(*id);
  if (deleted != deleted_.end() && clock_->Monotonic() - deleted->second < kDeletedIgnored) {
    return "";
  }
  return rows_.contains(*id) ? "" : *id;
}

bool ModelCatalog::HasNews(const Models& models) const {
  const absl::MutexLock lock(&mu_);
  for (const v1::Model& model : models) {
    if (!NewsOf(model).empty()) return true;
  }
  return false;
}

absl::Status ModelCatalog::Learn(const Models& models) {
  for (const v1::Model& model : models) {
    std::string id;
    {
      const absl::MutexLock lock(&mu_);
      id = NewsOf(model);
    }
    if (id.empty()) continue;
    v1::Model row = Row(model);
    row.set_name(ModelName(id));
    WALSH_RETURN_IF_ERROR(store_->PutModel(row));
    WALSH_LOG(Info, "model learnt from a worker", {"model", row.name()}, {"sha256", row.sha256()});
    const absl::MutexLock lock(&mu_);
    rows_[id] = std::move(row);
  }
  return absl::OkStatus();
}

void ModelCatalog::Publish(const v1::Model& model) {
  const absl::StatusOr<std::string> id = ParseModelName("model", model.name());
  if (!id.ok()) return;
  const absl::MutexLock lock(&mu_);
  rows_[*id] = Row(model);
  deleted_.erase(*id);
}

absl::Status ModelCatalog::Forget(const std::string& id) {
  WALSH_RETURN_IF_ERROR(store_->DeleteModel(id));
  const absl::MutexLock lock(&mu_);
  rows_.erase(id);
  const absl::Duration now = clock_->Monotonic();
  std::erase_if(deleted_, [&](const auto& entry) { return now - entry.second >= kDeletedIgnored; });
  deleted_[id] = now;
  return absl::OkStatus();
}

bool ModelCatalog::Knows(const std::string& id) const {
  const absl::MutexLock lock(&mu_);
  return rows_.contains(id);
}

absl::StatusOr<v1::Model> ModelCatalog::Get(const std::string& id) const {
  v1::Model row;
  {
    const absl::MutexLock lock(&mu_);
    const auto it = rows_.find(id);
    if (it == rows_.end()) return NotFound("model", id);
    row = it->second;
  }
  return Merge(row, registry_->Replicas(id));
}

std::vector<v1::Model> ModelCatalog::List(const std::string& after, int n_max) const {
  const std::map<std::string, std::vector<Replica>> replicas = registry_->AllReplicas();
  const absl::MutexLock lock(&mu_);
  std::vector<v1::Model> models;
  for (auto it = rows_.upper_bound(after);
       it != rows_.end() && static_cast<int>(models.size()) < n_max; ++it) {
    const auto found = replicas.find(it->first);
    models.push_back(
        Merge(it->second, found == replicas.end() ? std::span<const Replica>() : found->second));
  }
  return models;
}

std::map<std::string, v1::Model::State> ModelCatalog::States() const {
  const std::map<std::string, std::vector<Replica>> replicas = registry_->AllReplicas();
  const absl::MutexLock lock(&mu_);
  std::map<std::string, v1::Model::State> states;
  for (const auto& [id, row] : rows_) {
    const auto found = replicas.find(id);
    const bool is_there = found != replicas.end();
    states[id] = is_there ? Merge(row, found->second).state() : v1::Model::UNLOADED;
  }
  return states;
}

}  // namespace walsh::fleet
