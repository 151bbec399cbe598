// A job store in memory: what a disk keeps, for a coordinator that comes and goes.
//
// The contract is that of job_store.h, without the failures, which FaultyJobStore adds. Lists of
// jobs and aliases, which the simulation has no use for, are UNIMPLEMENTED.
//
// Threads: one.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/jobs/job_store.h"

namespace walsh::sim {

class MemoryJobStore : public jobs::JobStore {
 public:
  absl::Status Insert(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                      const jobs::RequestKey& key) override;
  absl::Status CheckNamesAreFree(const std::string& id,
                                 const std::string& model_name) const override;
  absl::Status Update(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                      const v1::Model* published) override;
  absl::Status Delete(const std::string& id) override;
  absl::StatusOr<jobs::JobRecord> Get(const std::string& id) const override;
  absl::StatusOr<std::vector<jobs::JobRecord>> Live() const override;
  absl::StatusOr<jobs::JobPage> List(const jobs::JobQuery& query) const override;
  absl::StatusOr<std::vector<v1::QuantizationJobEvent>> Events(const std::string& id, int64_t after,
                                                               int n_max) const override;
  absl::StatusOr<std::optional<jobs::StoredRequest>> FindRequest(
      const std::string& stored_id) const override;
  absl::Status PutModel(const v1::Model& model) override;
  absl::Status DeleteModel(const std::string& id) override;
  absl::StatusOr<std::vector<v1::Model>> Models() const override;
  absl::Status PutAlias(const v1::ModelAlias& alias) override;
  absl::Status DeleteAlias(const std::string& id) override;
  absl::StatusOr<std::vector<v1::ModelAlias>> Aliases() const override;

 private:
  struct Row {
    int64_t ordinal = 0;
    jobs::JobRecord record;
    std::vector<v1::QuantizationJobEvent> events;
  };
  std::map<std::string, Row> jobs_;  // by id
  int64_t next_ordinal_ = 1;
  std::map<std::string, jobs::StoredRequest> requests_;
  std::map<std::string, v1::Model> models_;  // by name
};

}  // namespace walsh::sim
