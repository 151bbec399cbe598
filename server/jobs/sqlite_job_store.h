// The job store in one SQLite file (schema.h), in WAL mode with synchronous=FULL.
//
// One connection writes, guarded by a mutex, one reads; a slow sync of the disk does not hold up
// reads.
#pragma once

#include <memory>
#include <string>

#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/jobs/job_store.h"
#include "server/jobs/sqlite.h"

namespace walsh::jobs {

class SqliteJobStore : public JobStore {
 public:
  // Opens or creates the file and brings it to this build's schema. `clock` outlives the store.
  static absl::StatusOr<std::unique_ptr<SqliteJobStore>> Open(const std::string& path,
                                                              const Clock* clock);

  absl::Status Insert(const JobRecord& record, const QuantizationJobEvent& event,
                      const RequestKey& key) override;
  absl::Status CheckNamesAreFree(const std::string& id,
                                 const std::string& model_name) const override;
  absl::Status Update(const JobRecord& record, const QuantizationJobEvent& event,
                      const v1::Model* published) override;
  absl::Status Delete(const std::string& id) override;
  absl::StatusOr<JobRecord> Get(const std::string& id) const override;
  absl::StatusOr<std::vector<JobRecord>> Live() const override;
  absl::StatusOr<JobPage> List(const JobQuery& query) const override;
  absl::StatusOr<std::vector<QuantizationJobEvent>> Events(const std::string& id, int64_t after,
                                                           int n_max) const override;
  absl::StatusOr<std::optional<StoredRequest>> FindRequest(
      const std::string& stored_id) const override;
  absl::Status PutModel(const v1::Model& model) override;
  absl::Status DeleteModel(const std::string& id) override;
  absl::StatusOr<std::vector<v1::Model>> Models() const override;
  absl::Status PutAlias(const v1::ModelAlias& alias) override;
  absl::Status DeleteAlias(const std::string& id) override;
  absl::StatusOr<std::vector<v1::ModelAlias>> Aliases() const override;

 private:
  SqliteJobStore(Connection writer, Connection reader, const Clock* clock);

  absl::Status AppendEvent(const std::string& id, const QuantizationJobEvent& event)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status InsertRequest(const std::string& job_id, const RequestKey& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status WriteModel(const v1::Model& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);

  const Clock* const clock_;
  mutable absl::Mutex write_mu_;
  Connection writer_ ABSL_GUARDED_BY(write_mu_);
  mutable absl::Mutex read_mu_;
  Connection reader_ ABSL_GUARDED_BY(read_mu_);
};

}  // namespace walsh::jobs
