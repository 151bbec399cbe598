// The job store of one life of a coordinator, on a disk that fails.
//
// A write may be refused (STORE_FULL), may fail with nothing or with all of it stored
// (STORE_IO_ERROR: its outcome is unknown), may take its time while the world goes on, and may be
// the last thing that the process does, before or after it. A process that is dead stores and reads
// nothing. What was stored is told to the history.
//
// Threads: one.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "server/jobs/job_store.h"
#include "tests/sim/world.h"

namespace walsh::sim {

class FaultyJobStore : public jobs::JobStore {
 public:
  // Both outlive the object.
  FaultyJobStore(World* world, jobs::JobStore* disk) : world_(*world), disk_(*disk) {}

  void Kill() { is_dead_ = true; }
  bool is_dead() const { return is_dead_; }

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
  // `stored` tells the history, and whether the caller will hear of it.
  absl::Status Write(const std::string& id, const std::function<absl::Status()>& write,
                     const std::function<void(bool is_told)>& stored);
  absl::Status CheckRead(const std::string& id) const;

  World& world_;
  jobs::JobStore& disk_;
  bool is_dead_ = false;
};

}  // namespace walsh::sim
