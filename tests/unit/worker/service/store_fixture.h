// A model store on a temporary folder, whose artifacts are real enough to be listed and whose
// models are fakes.
#pragma once

#include <absl/time/clock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>

#include "common/clock.h"
#include "tests/testing/fake_model.h"
#include "tests/testing/test_data.h"
#include "worker/service/model_store.h"

namespace walsh::service {

// config.json and walsh.json of an artifact without weights.
void WriteFakeArtifact(const std::string& directory);

// An endpoint where nobody listens.
std::unique_ptr<objects::ObjectStore> StoreThatIsAway();

class StoreFixture : public ::testing::Test {
 protected:
  // Opens the store anew, as a new process would.
  void OpenStore();
  void AddArtifact(const std::string& id) { WriteFakeArtifact(root_ + "/" + id); }

  testing::TempDir dir_;
  const std::string root_ = dir_ / "models";
  engine::Options engine_options_{.max_sequences = 4, .max_waiting = 4, .n_threads = 1};
  testing::FakeModel::Behaviour behaviour_;
  // Engines look at their clock until the store is gone.
  ManualClock manual_clock_{absl::Now()};
  Clock* clock_ = Clock::Real();
  absl::Duration drain_timeout_ = absl::Seconds(5);
  std::function<int64_t()> free_memory_ = {};
  ExclusiveUse* exclusive_ = nullptr;
  std::unique_ptr<ArtifactStore> artifacts_;
  ModelStore::Loader loader_ =
      [this](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    return testing::FakeModel::Create(behaviour_);
  };
  std::unique_ptr<ModelStore> store_;
};

}  // namespace walsh::service
