#include "tests/sim/faulty_job_store.h"

#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh::sim {
namespace {

std::string IdOf(const jobs::JobRecord& record) {
  return record.job.name().substr(kJobCollection.size());
}

absl::Status Full() {
  absl::Status status = absl::ResourceExhaustedError("job store: the disk is full");
  SetErrorInfo(status, "STORE_FULL");
  return status;
}

absl::Status IoError() {
  absl::Status status = absl::UnavailableError("job store: the disk failed");
  SetErrorInfo(status, "STORE_IO_ERROR");
  return status;
}

}  // namespace

absl::Status FaultyJobStore::Write(const std::string& id,
                                   const std::function<absl::Status()>& write,
                                   const std::function<void(bool is_told)>& stored) {
  DiskFaults& disk = world_.disk;
  const Phase phase = world_.history.PhaseOfJob(id);
  if (!is_dead_ && world_.random.Chance(disk.slow)) {
    world_.faults.Count(Fault::kSlowWrite, phase);
    const absl::Duration time = world_.random.Between(absl::Milliseconds(50), disk.slow_max);
    world_.loop.RunUntil(world_.loop.now() + time);
  }
  if (is_dead_) return IoError();
  if (disk.is_full) {
    world_.faults.Count(Fault::kDiskFull, phase);
    return Full();
  }
  const bool is_last = disk.writes_until_kill > 0 && --disk.writes_until_kill == 0;
  if (is_last && !disk.kills_after_write) {
    world_.faults.Count(Fault::kKilledBeforeWrite, phase);
    is_dead_ = true;
    return IoError();
  }
  const bool has_error = world_.random.Chance(disk.write_error);
  if (has_error && world_.random.Chance(0.5)) {
    world_.faults.Count(Fault::kWriteErrorLost, phase);
    return IoError();
  }
  WALSH_RETURN_IF_ERROR(write());
  if (is_last) world_.faults.Count(Fault::kKilledAfterWrite, phase);
  if (has_error) world_.faults.Count(Fault::kWriteErrorStored, phase);
  is_dead_ = is_last;
  stored(/*is_told=*/!is_last && !has_error);
  return is_last || has_error ? IoError() : absl::OkStatus();
}

absl::Status FaultyJobStore::CheckRead(const std::string& id) const {
  if (is_dead_) return IoError();
  if (!world_.random.Chance(world_.disk.read_error)) return absl::OkStatus();
  world_.faults.Count(Fault::kReadError, world_.history.PhaseOfJob(id));
  return IoError();
}

absl::Status FaultyJobStore::Insert(const jobs::JobRecord& record,
                                    const v1::QuantizationJobEvent& event,
                                    const jobs::RequestKey& key) {
  return Write(
      IdOf(record), [&] { return disk_.Insert(record, event, key); },
      [&](bool is_told) { world_.history.OnInsert(record, is_told); });
}

absl::Status FaultyJobStore::CheckNamesAreFree(const std::string& id,
                                               const std::string& model_name) const {
  WALSH_RETURN_IF_ERROR(CheckRead(id));
  return disk_.CheckNamesAreFree(id, model_name);
}

absl::Status FaultyJobStore::Update(const jobs::JobRecord& record,
                                    const v1::QuantizationJobEvent& event,
                                    const v1::Model* published) {
  return Write(
      IdOf(record), [&] { return disk_.Update(record, event, published); },
      [&](bool is_told) { world_.history.OnUpdate(record, event, published, is_told); });
}

absl::Status FaultyJobStore::Delete(const std::string& id) {
  return Write(
      id, [&] { return disk_.Delete(id); }, [&](bool) { world_.history.OnDelete(id); });
}

absl::StatusOr<jobs::JobRecord> FaultyJobStore::Get(const std::string& id) const {
  WALSH_RETURN_IF_ERROR(CheckRead(id));
  return disk_.Get(id);
}

absl::StatusOr<std::vector<jobs::JobRecord>> FaultyJobStore::Live() const {
  WALSH_RETURN_IF_ERROR(CheckRead(""));
  return disk_.Live();
}

absl::StatusOr<jobs::JobPage> FaultyJobStore::List(const jobs::JobQuery& query) const {
  return disk_.List(query);
}

absl::StatusOr<std::vector<v1::QuantizationJobEvent>> FaultyJobStore::Events(const std::string& id,
                                                                             int64_t after,
                                                                             int n_max) const {
  WALSH_RETURN_IF_ERROR(CheckRead(id));
  return disk_.Events(id, after, n_max);
}

absl::StatusOr<std::optional<jobs::StoredRequest>> FaultyJobStore::FindRequest(
    const std::string& stored_id) const {
  WALSH_RETURN_IF_ERROR(CheckRead(""));
  return disk_.FindRequest(stored_id);
}

absl::Status FaultyJobStore::PutModel(const v1::Model& model) { return disk_.PutModel(model); }

absl::Status FaultyJobStore::DeleteModel(const std::string& id) { return disk_.DeleteModel(id); }

absl::StatusOr<std::vector<v1::Model>> FaultyJobStore::Models() const { return disk_.Models(); }

absl::Status FaultyJobStore::PutAlias(const v1::ModelAlias& alias) { return disk_.PutAlias(alias); }

absl::Status FaultyJobStore::DeleteAlias(const std::string& id) { return disk_.DeleteAlias(id); }

absl::StatusOr<std::vector<v1::ModelAlias>> FaultyJobStore::Aliases() const {
  return disk_.Aliases();
}

}  // namespace walsh::sim
