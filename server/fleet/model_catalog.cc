#include "server/fleet/model_catalog.h"

#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh::fleet {
namespace {

// Longer than any heartbeat is on its way.
constexpr absl::Duration kDeletedIgnored = absl::Minutes(1);
// Longer than a worker's next heartbeat takes to come.
constexpr absl::Duration kImportedReserved = absl::Minutes(1);

absl::Status NotPossible(std::string_view message, std::string_view reason,
                         std::string_view subject, std::string_view description) {
  absl::Status status =
      absl::FailedPreconditionError(absl::string_view(message.data(), message.size()));
  SetErrorInfo(status, reason);
  SetPreconditionFailure(status, reason, subject, description);
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelCatalog>> ModelCatalog::Open(jobs::JobStore* store,
                                                                 const WorkerRegistry* registry,
                                                                 const Clock* clock) {
  std::unique_ptr<ModelCatalog> catalog(new ModelCatalog(store, registry, clock));
  WALSH_ASSIGN_OR_RETURN(const std::vector<v1::Model> models, store->Models());
  for (const v1::Model& model : models) catalog->Publish(model);
  WALSH_ASSIGN_OR_RETURN(const std::vector<v1::ModelAlias> aliases, store->Aliases());
  const absl::MutexLock lock(&catalog->mu_);
  for (const v1::ModelAlias& alias : aliases) {
    catalog->aliases_[alias.name().substr(kAliasCollection.size())] =
        alias.model().substr(kModelCollection.size());
  }
  return catalog;
}

v1::Model ModelCatalog::Row(const v1::Model& model) {
  v1::Model row = model;
  row.clear_state();
  row.clear_worker();
  row.clear_memory_bytes();
  row.clear_error();
  row.clear_revision();
  row.clear_aliases();
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
    if (aliases_.contains(id)) {
      WALSH_LOG(Warning, "a model of a worker has the name of an alias, which goes before it",
                {"model", row.name()}, {"alias_of", ModelName(aliases_[id])});
    }
    rows_[id] = std::move(row);
    reserved_.erase(id);
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

absl::Status ModelCatalog::CheckAlias(const std::string& alias, const std::string& model,
                                      bool force) const {
  {
    const absl::MutexLock lock(&mu_);
    if (const auto target = aliases_.find(model); target != aliases_.end()) {
      return NotPossible(
          absl::StrCat("alias '", alias, "' cannot point at '", model, "', an alias of model '",
                       target->second, "': name the model"),
          "ALIAS_OF_ALIAS", AliasName(model), "is an alias");
    }
    if (!rows_.contains(model)) return NotFound("model", model);
    const bool is_new = !aliases_.contains(alias);
    if (is_new && aliases_.size() >= limits::kAliasesMax) {
      absl::Status status = absl::ResourceExhaustedError(
          absl::StrCat("there are ", aliases_.size(), " aliases, of ", limits::kAliasesMax,
                       " at most: remove one (`walsh models unalias NAME`)"));
      SetErrorInfo(status, "TOO_MANY_ALIASES");
      return status;
    }
    if (deletions_.contains(model)) {
      return NotPossible(absl::StrCat("model '", model, "' is being deleted"), "MODEL_DELETING",
                         ModelName(model), "is being deleted");
    }
  }
  if (force) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const v1::Model target, Get(model));
  if (target.state() == v1::Model::READY) return absl::OkStatus();
  return NotPossible(
      absl::StrCat("model '", model, "' is ", v1::Model::State_Name(target.state()),
                   ", requests to alias '", alias,
                   "' would fail: load it first (`walsh models load ", model, "`), or use force"),
      "MODEL_NOT_LOADED", ModelName(model), v1::Model::State_Name(target.state()));
}

absl::StatusOr<v1::ModelAlias> ModelCatalog::SetAlias(const std::string& alias,
                                                      const std::string& model, bool force) {
  const absl::MutexLock writing(&alias_mu_);
  WALSH_RETURN_IF_ERROR(CheckAlias(alias, model, force));
  bool is_new = false;
  {
    const absl::MutexLock lock(&mu_);
    if (IsReserved(alias)) return NameTaken("alias", alias, "a model that is being imported");
    is_new = !aliases_.contains(alias);
    if (is_new) reserved_[alias] = absl::InfiniteDuration();
  }
  const absl::Cleanup release = [&] {
    const absl::MutexLock lock(&mu_);
    if (is_new) reserved_.erase(alias);
  };
  v1::ModelAlias row;
  row.set_name(AliasName(alias));
  row.set_model(ModelName(model));
  // To the microsecond, as it is stored.
  const int64_t micros = absl::ToUnixMicros(clock_->Now());
  row.mutable_update_time()->set_seconds(micros / 1'000'000);
  row.mutable_update_time()->set_nanos(static_cast<int32_t>(micros % 1'000'000 * 1000));
  WALSH_RETURN_IF_ERROR(store_->PutAlias(row));
  std::string before;
  {
    const absl::MutexLock lock(&mu_);
    before = std::exchange(aliases_[alias], model);
  }
  WALSH_LOG(Info, "alias points at a model", {"alias", alias}, {"model", row.model()},
            {"before", before.empty() ? "" : ModelName(before)});
  return row;
}

absl::Status ModelCatalog::DeleteAlias(const std::string& alias) {
  const absl::MutexLock writing(&alias_mu_);
  {
    const absl::MutexLock lock(&mu_);
    if (!aliases_.contains(alias)) return NotFound("alias", alias);
  }
  WALSH_RETURN_IF_ERROR(store_->DeleteAlias(alias));
  const absl::MutexLock lock(&mu_);
  WALSH_LOG(Info, "alias removed", {"alias", alias}, {"before", ModelName(aliases_[alias])});
  aliases_.erase(alias);
  return absl::OkStatus();
}

std::map<std::string, std::string> ModelCatalog::Aliases() const {
  const absl::MutexLock lock(&mu_);
  return aliases_;
}

std::map<std::string, std::vector<std::string>> ModelCatalog::AliasesByModel() const {
  std::map<std::string, std::vector<std::string>> by_model;
  for (const auto& [alias, model] : aliases_) by_model[model].push_back(alias);
  return by_model;
}

absl::Status ModelCatalog::BeginDelete(const std::string& id) {
  const absl::MutexLock writing(&alias_mu_);
  const absl::MutexLock lock(&mu_);
  for (const auto& [alias, model] : aliases_) {
    if (model != id) continue;
    return NotPossible(absl::StrCat("alias '", alias, "' points at model '", id,
                                    "': point it at another one (`walsh models alias ", alias,
                                    " MODEL`) or remove it (`walsh models unalias ", alias, "`)"),
                       "MODEL_HAS_ALIAS", ModelName(id), AliasName(alias));
  }
  ++deletions_[id];
  return absl::OkStatus();
}

void ModelCatalog::EndDelete(const std::string& id) {
  const absl::MutexLock lock(&mu_);
  if (--deletions_[id] == 0) deletions_.erase(id);
}

bool ModelCatalog::IsReserved(const std::string& name) const {
  const auto reserved = reserved_.find(name);
  return reserved != reserved_.end() && clock_->Monotonic() < reserved->second;
}

absl::Status ModelCatalog::BeginImport(const std::string& id) {
  const absl::MutexLock lock(&mu_);
  if (rows_.contains(id)) return NameTaken("model", id, "a published model");
  if (aliases_.contains(id)) return NameTaken("model", id, "an alias");
  if (IsReserved(id)) return NameTaken("model", id, "another import or a new alias");
  reserved_[id] = absl::InfiniteDuration();
  return absl::OkStatus();
}

void ModelCatalog::EndImport(const std::string& id, bool is_published) {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  std::erase_if(reserved_, [&](const auto& entry) { return now >= entry.second; });
  if (is_published && !rows_.contains(id)) {
    reserved_[id] = now + kImportedReserved;
  } else {
    reserved_.erase(id);
  }
}

absl::StatusOr<std::string> ModelCatalog::ResolveLocked(const std::string& name) const {
  if (const auto alias = aliases_.find(name); alias != aliases_.end()) return alias->second;
  if (!rows_.contains(name)) return NotFound("model", name);
  return name;
}

absl::StatusOr<std::string> ModelCatalog::Resolve(const std::string& name) const {
  const absl::MutexLock lock(&mu_);
  return ResolveLocked(name);
}

absl::Status ModelCatalog::ForModel(
    const std::string& name, absl::FunctionRef<absl::Status(const std::string& id)> use) const {
  const absl::MutexLock lock(&mu_);
  WALSH_ASSIGN_OR_RETURN(const std::string id, ResolveLocked(name));
  return use(id);
}

absl::Status ModelCatalog::CheckIsModel(const std::string& id) const {
  const absl::MutexLock lock(&mu_);
  if (rows_.contains(id)) return absl::OkStatus();
  const auto alias = aliases_.find(id);
  if (alias == aliases_.end()) return NotFound("model", id);
  absl::Status status = absl::NotFoundError(absl::StrCat(
      "'", id, "' is an alias of model '", alias->second, "', which must be named itself here"));
  SetErrorInfo(status, "IS_ALIAS", {{"alias", id}, {"model", alias->second}});
  return status;
}

bool ModelCatalog::Knows(const std::string& id) const {
  const absl::MutexLock lock(&mu_);
  return rows_.contains(id);
}

absl::StatusOr<v1::Model> ModelCatalog::Get(const std::string& id) const {
  v1::Model row;
  std::vector<std::string> aliases;
  {
    const absl::MutexLock lock(&mu_);
    const auto it = rows_.find(id);
    if (it == rows_.end()) return NotFound("model", id);
    row = it->second;
    for (const auto& [alias, model] : aliases_) {
      if (model == id) aliases.push_back(alias);
    }
  }
  v1::Model merged = Merge(row, registry_->Replicas(id));
  merged.mutable_aliases()->Assign(aliases.begin(), aliases.end());
  return merged;
}

std::vector<v1::Model> ModelCatalog::List(const std::string& after, int n_max) const {
  const std::map<std::string, std::vector<Replica>> replicas = registry_->AllReplicas();
  const absl::MutexLock lock(&mu_);
  const std::map<std::string, std::vector<std::string>> aliases = AliasesByModel();
  std::vector<v1::Model> models;
  for (auto it = rows_.upper_bound(after);
       it != rows_.end() && static_cast<int>(models.size()) < n_max; ++it) {
    const auto found = replicas.find(it->first);
    models.push_back(
        Merge(it->second, found == replicas.end() ? std::span<const Replica>() : found->second));
    models.back().clear_aliases();
    if (const auto own = aliases.find(it->first); own != aliases.end()) {
      models.back().mutable_aliases()->Assign(own->second.begin(), own->second.end());
    }
  }
  return models;
}

std::vector<v1::Model> ModelCatalog::Rows() const {
  const absl::MutexLock lock(&mu_);
  std::vector<v1::Model> rows;
  rows.reserve(rows_.size());
  for (const auto& [id, row] : rows_) rows.push_back(row);
  return rows;
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
