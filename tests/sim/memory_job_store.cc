#include "tests/sim/memory_job_store.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh::sim {
namespace {

std::string IdOf(const jobs::JobRecord& record) {
  return record.job.name().substr(kJobCollection.size());
}

}  // namespace

absl::Status MemoryJobStore::Insert(const jobs::JobRecord& record,
                                    const v1::QuantizationJobEvent& event,
                                    const jobs::RequestKey& key) {
  const std::string id = IdOf(record);
  WALSH_RETURN_IF_ERROR(CheckNamesAreFree(id, record.job.model_name()));
  jobs_[id] = {.ordinal = next_ordinal_++, .record = record, .events = {event}};
  if (!key.request_id.empty()) requests_[key.stored_id()] = {key.body_sha256, id};
  return absl::OkStatus();
}

absl::Status MemoryJobStore::CheckNamesAreFree(const std::string& id,
                                               const std::string& model_name) const {
  if (jobs_.contains(id)) return absl::AlreadyExistsError(absl::StrCat("job ", id));
  const bool is_taken = std::any_of(jobs_.begin(), jobs_.end(), [&](const auto& job) {
    return !jobs::IsTerminal(job.second.record.job.state()) &&
           job.second.record.job.model_name() == model_name;
  });
  if (!is_taken && !models_.contains(ModelName(model_name))) return absl::OkStatus();
  return absl::AlreadyExistsError(absl::StrCat("model ", model_name));
}

absl::Status MemoryJobStore::Update(const jobs::JobRecord& record,
                                    const v1::QuantizationJobEvent& event,
                                    const v1::Model* published) {
  const auto it = jobs_.find(IdOf(record));
  if (it == jobs_.end()) return absl::InternalError("an update of a job that is not there");
  Row& row = it->second;
  if (event.sequence() <= row.events.back().sequence()) {
    return absl::AlreadyExistsError(absl::StrCat("event ", event.sequence(), " of ", it->first));
  }
  row.record = record;
  // As from a file, which has no such columns.
  row.record.refusals.clear();
  row.events.push_back(event);
  if (published != nullptr) models_[published->name()] = *published;
  return absl::OkStatus();
}

absl::Status MemoryJobStore::Delete(const std::string& id) {
  jobs_.erase(id);
  return absl::OkStatus();
}

absl::StatusOr<jobs::JobRecord> MemoryJobStore::Get(const std::string& id) const {
  const auto it = jobs_.find(id);
  if (it == jobs_.end()) return NotFound("job", JobName(id));
  return it->second.record;
}

absl::StatusOr<std::vector<jobs::JobRecord>> MemoryJobStore::Live() const {
  std::map<int64_t, jobs::JobRecord> by_age;
  for (const auto& [id, row] : jobs_) {
    if (!jobs::IsTerminal(row.record.job.state())) by_age[row.ordinal] = row.record;
  }
  std::vector<jobs::JobRecord> live;
  for (auto& [ordinal, record] : by_age) live.push_back(std::move(record));
  return live;
}

absl::StatusOr<jobs::JobPage> MemoryJobStore::List(const jobs::JobQuery&) const {
  return absl::UnimplementedError("List");
}

absl::StatusOr<std::vector<v1::QuantizationJobEvent>> MemoryJobStore::Events(const std::string& id,
                                                                             int64_t after,
                                                                             int n_max) const {
  std::vector<v1::QuantizationJobEvent> events;
  const auto it = jobs_.find(id);
  if (it == jobs_.end()) return events;
  for (const v1::QuantizationJobEvent& event : it->second.events) {
    if (std::ssize(events) == n_max) break;
    if (event.sequence() > after) events.push_back(event);
  }
  return events;
}

absl::StatusOr<std::optional<jobs::StoredRequest>> MemoryJobStore::FindRequest(
    const std::string& stored_id) const {
  const auto it = requests_.find(stored_id);
  if (it == requests_.end()) return std::nullopt;
  return it->second;
}

absl::Status MemoryJobStore::PutModel(const v1::Model& model) {
  models_[model.name()] = model;
  return absl::OkStatus();
}

absl::Status MemoryJobStore::DeleteModel(const std::string& id) {
  models_.erase(ModelName(id));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<v1::Model>> MemoryJobStore::Models() const {
  std::vector<v1::Model> models;
  for (const auto& [name, model] : models_) models.push_back(model);
  return models;
}

absl::Status MemoryJobStore::PutAlias(const v1::ModelAlias&) {
  return absl::UnimplementedError("PutAlias");
}

absl::Status MemoryJobStore::DeleteAlias(const std::string&) {
  return absl::UnimplementedError("DeleteAlias");
}

absl::StatusOr<std::vector<v1::ModelAlias>> MemoryJobStore::Aliases() const {
  return std::vector<v1::ModelAlias>();
}

}  // namespace walsh::sim
