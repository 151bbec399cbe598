// Objects in a bucket of an S3-compatible endpoint, addressed by path.
//
// What fails in passing (no connection, 429, 5xx) is tried again with growing pauses, up to the
// deadline. A large object goes up in parts and appears with the last call; where that does not
// come the parts are removed, but for those of a process that dies: a rule of the bucket ends such
// uploads (docs/stores.md). Versions are ETags.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/objects/object_store.h"
#include "worker/objects/s3_options.h"

namespace walsh::objects {

absl::StatusOr<std::unique_ptr<ObjectStore>> OpenS3Store(S3Options options);

}  // namespace walsh::objects
