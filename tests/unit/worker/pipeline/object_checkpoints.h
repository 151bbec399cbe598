// Checkpoints in an object store, as a place of checkpoint_store_conformance.h.
#pragma once

#include <memory>
#include <utility>

#include "tests/unit/worker/pipeline/checkpoint_store_conformance.h"
#include "worker/objects/object_store.h"
#include "worker/pipeline/object_checkpoint_store.h"

namespace walsh::pipeline {

class ObjectCheckpoints final : public CheckpointPlace {
 public:
  explicit ObjectCheckpoints(std::unique_ptr<objects::ObjectStore> objects)
      : objects_(std::move(objects)) {}
  std::unique_ptr<CheckpointStore> Open(int64_t token) override {
    return MakeObjectCheckpointStore(objects_.get(), "job-1", "family", token);
  }
  absl::Status Remove() override { return RemoveObjectCheckpoints(*objects_, "job-1"); }

 private:
  const std::unique_ptr<objects::ObjectStore> objects_;
};

}  // namespace walsh::pipeline
