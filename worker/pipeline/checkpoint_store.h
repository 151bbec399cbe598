// Where a job's checkpoint is kept: objects by their SHA-256, and the two last generations, each a
// manifest and the objects that it needs.
//
// A generation is committed after its objects are on the disk, by one rename. The job's fencing
// token is in it and decides who may: whoever claims the checkpoint with a larger one shuts out all
// before, however long they have slept. What the manifest says is worker/pipeline/job_checkpoint.h.
//
// A directory has
//   objects/<SHA-256>   what its name says, else it is damaged
//   CURRENT, PREVIOUS   generations: a line with the SHA-256 of the rest, and a JSON document
//   lock                held (flock) while a token is compared and CURRENT replaced
// and may be shared by the workers of one machine or file system.
//
// Errors:  ABORTED           another holder of the job, with a larger token, has claimed it
//          UNAVAILABLE       another writer has the lock this moment
//          DATA_LOSS         an object is damaged or missing
//          RESOURCE_EXHAUSTED and the others of common/publish.h
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace walsh::pipeline {

class CheckpointStore {
 public:
  struct Object {
    std::string sha256;
    int64_t size_bytes = 0;
  };
  struct Generation {
    std::string manifest;
    std::vector<Object> objects;
  };
  struct Found {
    std::vector<Generation> generations;  // the newest first; their objects are not looked at
    int n_damaged = 0;                    // that are there and cannot be read
  };

  virtual ~CheckpointStore() = default;

  // Shuts out all holders with smaller tokens. Before anything else.
  virtual absl::StatusOr<Found> Claim() = 0;
  virtual absl::StatusOr<Object> Put(std::string_view contents) = 0;
  // Fills `into`, which has the object's size.
  virtual absl::Status Get(const Object& object, std::span<std::byte> into) const = 0;
  // The same without keeping it.
  virtual absl::Status Check(const Object& object) const = 0;
  // Objects that neither this nor the former generation needs are removed.
  virtual absl::Status Commit(const Generation& generation) = 0;
  // Removes what was put since the last commit.
  virtual absl::Status Discard() = 0;
  virtual absl::StatusOr<int64_t> FreeBytes() const = 0;
};

// In `directory`, which Claim() creates. `fencing_token` is that of the job's lease.
std::unique_ptr<CheckpointStore> MakeDirectoryCheckpointStore(std::string directory,
                                                              int64_t fencing_token);

// Removes the folders of `directory` whose checkpoints nobody has claimed or committed for so long:
// of jobs that ended while no worker had them.
absl::Status RemoveStaleCheckpoints(const std::string& directory, absl::Duration age);

}  // namespace walsh::pipeline
