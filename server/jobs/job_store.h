// Where jobs, their events, published models and their aliases survive the process.
//
// What a call stored is on disk when it returns OK, all of it or nothing. Ids here are bare ("a",
// not "quantizationJobs/a").
//
// Errors:  RESOURCE_EXHAUSTED  the disk is full or read-only (ErrorInfo STORE_FULL): nothing was
//                              stored, reads go on
//          UNAVAILABLE         the disk failed (STORE_IO_ERROR): nothing is known to be stored
//          DATA_LOSS           the file is damaged
//          NOT_FOUND, ALREADY_EXISTS where stated
// Threads: safe. Writes run one at a time; reads run beside them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/jobs/job.h"
#include "server/jobs/job_query.h"
#include "walsh/v1/model.pb.h"

namespace walsh::jobs {

// The idempotency key of a Create call and what it asked for.
struct RequestKey {
  std::string request_id;  // empty: none
  std::string body_sha256;
  std::string tenant = "";  // whose ids are apart from those of others

  // What it is stored under. No id and no tenant has the stroke.
  std::string stored_id() const { return tenant.empty() ? request_id : tenant + "/" + request_id; }
};

struct StoredRequest {
  std::string body_sha256;
  std::string job_id;
};

class JobStore {
 public:
  virtual ~JobStore() = default;

  // Stores a new job with its first event. ALREADY_EXISTS when the id, or the model name of a live
  // job, a published model or an alias, is taken.
  virtual absl::Status Insert(const JobRecord& record, const QuantizationJobEvent& event,
                              const RequestKey& key) = 0;
  // Whether Insert would take these names: ALREADY_EXISTS. An empty id is always free.
  virtual absl::Status CheckNamesAreFree(const std::string& id,
                                         const std::string& model_name) const = 0;
  // Replaces a job and appends an event; `published` is the model that the job made, or null.
  virtual absl::Status Update(const JobRecord& record, const QuantizationJobEvent& event,
                              const v1::Model* published) = 0;
  // Removes a job and its events. OK when there is none.
  virtual absl::Status Delete(const std::string& id) = 0;

  // NOT_FOUND.
  virtual absl::StatusOr<JobRecord> Get(const std::string& id) const = 0;
  // Every job that is not terminal, oldest first.
  virtual absl::StatusOr<std::vector<JobRecord>> Live() const = 0;
  virtual absl::StatusOr<JobPage> List(const JobQuery& query) const = 0;
  // Events with a sequence above `after`, in order, at most `n_max`.
  virtual absl::StatusOr<std::vector<QuantizationJobEvent>> Events(const std::string& id,
                                                                   int64_t after,
                                                                   int n_max) const = 0;
  // A request that was stored within the last 7 days, by RequestKey::stored_id.
  virtual absl::StatusOr<std::optional<StoredRequest>> FindRequest(
      const std::string& stored_id) const = 0;

  // Models by id. Put replaces.
  virtual absl::Status PutModel(const v1::Model& model) = 0;
  virtual absl::Status DeleteModel(const std::string& id) = 0;
  virtual absl::StatusOr<std::vector<v1::Model>> Models() const = 0;

  // Aliases by id. Put replaces; one that is new gets ALREADY_EXISTS when a published model or a
  // live job's has the name. The model that it points at is stored.
  virtual absl::Status PutAlias(const v1::ModelAlias& alias) = 0;
  virtual absl::Status DeleteAlias(const std::string& id) = 0;
  virtual absl::StatusOr<std::vector<v1::ModelAlias>> Aliases() const = 0;
};

}  // namespace walsh::jobs
