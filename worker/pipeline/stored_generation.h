// The text of a checkpoint's generation: a line with the SHA-256 of the rest, and a JSON document.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "worker/pipeline/checkpoint_store.h"

namespace walsh::pipeline {

struct StoredGeneration {
  int64_t fencing_token = 0;
  CheckpointStore::Generation generation;
};

std::string ToText(const StoredGeneration& stored);
// DATA_LOSS for anything but what ToText made.
absl::StatusOr<StoredGeneration> FromText(std::string_view text);

// ABORTED where the checkpoint belongs to the holder of a larger token.
absl::Status CheckToken(int64_t stored_token, int64_t fencing_token);
// What Get and Check say of an object that is not what it should be.
absl::Status DamagedObject(const CheckpointStore::Object& object);

}  // namespace walsh::pipeline
