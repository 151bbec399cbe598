// What every checkpoint store promises, wherever it is: instantiated for the folder and for objects
// here, for a real S3 server in tests/integration.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "worker/pipeline/checkpoint_store.h"

namespace walsh::pipeline {

// A place for the checkpoint of one job.
class CheckpointPlace {
 public:
  virtual ~CheckpointPlace() = default;
  virtual std::unique_ptr<CheckpointStore> Open(int64_t token) = 0;
  // As when the job has ended.
  virtual absl::Status Remove() = 0;
};
// `folder` is a new one that goes with the test.
using CheckpointPlaceFactory =
    std::function<std::unique_ptr<CheckpointPlace>(const std::string& folder)>;

class CheckpointPlaceTest : public ::testing::TestWithParam<CheckpointPlaceFactory> {
 protected:
  using Object = CheckpointStore::Object;

  void SetUp() override { place_ = GetParam()(folder_.path()); }

  // What a run with this token finds.
  CheckpointStore::Found Find(int64_t token) {
    absl::StatusOr<CheckpointStore::Found> found = place_->Open(token)->Claim();
    EXPECT_OK(found.status());
    return found.ok() ? *std::move(found) : CheckpointStore::Found();
  }
  static Object Keep(CheckpointStore& store, const std::string& contents) {
    absl::StatusOr<Object> object = store.Put(contents);
    EXPECT_OK(object.status());
    return object.ok() ? *object : Object();
  }

  testing::TempDir folder_;
  std::unique_ptr<CheckpointPlace> place_;
};

TEST_P(CheckpointPlaceTest, KeepsTheTwoLastGenerations) {
  const auto store = place_->Open(1);
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Found nothing, store->Claim());
  EXPECT_TRUE(nothing.generations.empty());
  const Object layer = Keep(*store, "a layer");
  std::vector<Object> states;
  for (const char* name : {"first", "second", "third"}) {
    states.push_back(Keep(*store, name));
    ASSERT_OK(store->Commit({name, {layer, states.back()}}));
  }
  const CheckpointStore::Found found = Find(2);
  ASSERT_EQ(found.generations.size(), 2);
  EXPECT_EQ(found.generations[0].manifest, "third");
  EXPECT_EQ(found.generations[1].manifest, "second");
  EXPECT_EQ(found.n_damaged, 0);
  EXPECT_OK(store->Check(layer));
  EXPECT_OK(store->Check(states[1]));
  EXPECT_THAT(store->Check(states[0]), testing::HasCode(absl::StatusCode::kDataLoss));
  std::string contents(5, ' ');
  ASSERT_OK(store->Get(states[2], std::as_writable_bytes(std::span(contents))));
  EXPECT_EQ(contents, "third");
}

TEST_P(CheckpointPlaceTest, AHolderOfBeforeCanChangeNothing) {
  const auto old_holder = place_->Open(1);
  ASSERT_OK(old_holder->Claim());
  const Object object = Keep(*old_holder, "old");
  ASSERT_OK(old_holder->Commit({"old", {object}}));
  const auto holder = place_->Open(2);
  ASSERT_OK(holder->Claim());
  const Object late = Keep(*old_holder, "late");
  EXPECT_THAT(old_holder->Commit({"older still", {late}}),
              testing::HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(old_holder->Discard(), testing::HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(place_->Open(1)->Claim(), testing::HasCode(absl::StatusCode::kAborted));
  EXPECT_OK(holder->Commit({"new", {object}}));
  EXPECT_THAT(holder->Check(late), testing::HasCode(absl::StatusCode::kDataLoss));
  const CheckpointStore::Found found = Find(3);
  ASSERT_EQ(found.generations.size(), 2);
  EXPECT_EQ(found.generations[0].manifest, "new");
  EXPECT_EQ(found.generations[1].manifest, "old");
}

TEST_P(CheckpointPlaceTest, ARemovedOneIsNotMadeAgain) {
  const auto store = place_->Open(1);
  ASSERT_OK(store->Claim());
  ASSERT_OK(place_->Remove());
  EXPECT_THAT(store->Commit({"late", {}}), testing::HasCode(absl::StatusCode::kNotFound));
  EXPECT_TRUE(Find(2).generations.empty());
}

TEST_P(CheckpointPlaceTest, DiscardRemovesWhatWasNotCommitted) {
  const auto store = place_->Open(1);
  ASSERT_OK(store->Claim());
  const Object kept = Keep(*store, "kept");
  ASSERT_OK(store->Commit({"m", {kept}}));
  const Object discarded = Keep(*store, "put, and the disk was full");
  ASSERT_OK(store->Discard());
  EXPECT_OK(store->Check(kept));
  EXPECT_THAT(store->Check(discarded), testing::HasCode(absl::StatusCode::kDataLoss));
}

}  // namespace walsh::pipeline
