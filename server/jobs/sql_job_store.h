// The job store in a database that speaks SQL (sql.h, schema.h): a file of SQLite's, or PostgreSQL.
//
// One connection writes, guarded by a mutex, one reads; a slow sync of the disk does not hold up
// reads.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/jobs/job_store.h"
#include "server/jobs/sql.h"

namespace walsh::jobs {

// What lets one process at a time write to a database that several have open (leadership.h).
struct WriteFence {
  // A write takes place only while this is the epoch of the leader; else it is UNAVAILABLE
  // (ErrorInfo NOT_LEADER).
  int64_t epoch = 0;
  // Called when that is over, and when a write may have taken place and nobody knows: what the
  // process remembers may be older than the database. Must not call the store.
  std::function<void(const absl::Status& why)> on_lost;
};

class SqlJobStore : public JobStore {
 public:
  // Opens or creates what is there and brings it to this build's schema. `clock` outlives the
  // store.
  static absl::StatusOr<std::unique_ptr<SqlJobStore>> OpenSqlite(const std::string& path,
                                                                 const Clock* clock);
  static absl::StatusOr<std::unique_ptr<SqlJobStore>> OpenPostgres(const std::string& uri,
                                                                   WriteFence fence,
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
  SqlJobStore(std::unique_ptr<Connection> writer, std::unique_ptr<Connection> reader,
              std::optional<WriteFence> fence, const Clock* clock);

  // Every write is between these two.
  absl::StatusOr<Transaction> BeginWrite() ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status Commit(Transaction transaction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status AppendEvent(const std::string& id, const QuantizationJobEvent& event)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status InsertRequest(const std::string& job_id, const RequestKey& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status WriteModel(const v1::Model& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);

  const std::optional<WriteFence> fence_;
  const Clock* const clock_;
  mutable absl::Mutex write_mu_;
  const std::unique_ptr<Connection> writer_ ABSL_PT_GUARDED_BY(write_mu_);
  mutable absl::Mutex read_mu_;
  const std::unique_ptr<Connection> reader_ ABSL_PT_GUARDED_BY(read_mu_);
};

}  // namespace walsh::jobs
