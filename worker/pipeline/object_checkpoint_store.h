// A checkpoint in an object store: the same as in a directory (worker/pipeline/checkpoint_store.h),
// with a conditional write in the place of lock and rename.
//
//   checkpoints/<job>/<family>/objects/<SHA-256>  what its name says: also each generation
//   checkpoints/<job>/<family>/CURRENT            the holder's token, and the two last generations
//
// CURRENT is replaced only while it is of the version that its writer has seen, which proves that
// nobody has claimed the checkpoint meanwhile. What a commit removes was there before it, so that
// it is nothing that a holder who comes after has put.
//
// Errors:  UNAVAILABLE        also where another writer was faster with the same token
//          the others of worker/pipeline/checkpoint_store.h and worker/objects/object_store.h
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/objects/object_store.h"
#include "worker/pipeline/checkpoint_store.h"

namespace walsh::pipeline {

// `store` outlives the result.
std::unique_ptr<CheckpointStore> MakeObjectCheckpointStore(objects::ObjectStore* store,
                                                           const std::string& job,
                                                           const std::string& family,
                                                           int64_t fencing_token);

// Of all families.
absl::Status RemoveObjectCheckpoints(objects::ObjectStore& store, const std::string& job);
// As RemoveStaleCheckpoints.
absl::Status RemoveStaleObjectCheckpoints(objects::ObjectStore& store, absl::Duration age);

}  // namespace walsh::pipeline
