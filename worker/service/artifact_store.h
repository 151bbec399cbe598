// Published artifacts in a store that outlives the worker and that other workers share.
//
// Of each model there are
//   models/<id>/objects/<SHA-256>  its files by their contents
//   models/<id>/model.json         their names, sizes and digests, the job and its fencing token
// The last is written last and only where there is none: a model is there with all its files, or
// not at all, and the first of two writers has made it. What an upload that failed left goes with
// the next one of the name, or with Remove.
//
// Errors:  NOT_FOUND       no such model
//          ALREADY_EXISTS  (MODEL_EXISTS) another artifact has the name
//          DATA_LOSS       what is stored is damaged; those of worker/objects/object_store.h
// Threads: safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/objects/object_store.h"

namespace walsh::service {

class ArtifactStore {
 public:
  // Whose work an artifact is.
  struct Origin {
    std::string job_name;  // empty: no job's
    int64_t fencing_token = 0;
  };

  explicit ArtifactStore(std::unique_ptr<objects::ObjectStore> objects);

  // Copies the artifact. OK where the same one is there already.
  absl::Status Keep(const std::string& id, const std::string& directory, const Origin& origin,
                    const KeepGoing& keep_going);
  absl::StatusOr<Origin> Find(const std::string& id, const KeepGoing& keep_going = {}) const;
  // Into `directory`, which must not exist and is left incomplete after an error. All files have
  // their digests.
  absl::StatusOr<Origin> Fetch(const std::string& id, const std::string& directory,
                               const KeepGoing& keep_going) const;
  absl::Status Remove(const std::string& id);
  // What runs ends soon.
  void Stop() { objects_->Stop(); }

 private:
  const std::unique_ptr<objects::ObjectStore> objects_;
};

// ALREADY_EXISTS (MODEL_EXISTS): the store has another model of this name.
absl::Status StoredAlready(const std::string& id);

}  // namespace walsh::service
