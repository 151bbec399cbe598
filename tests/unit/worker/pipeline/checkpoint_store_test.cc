#include "worker/pipeline/checkpoint_store.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::pipeline {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;
using ::walsh::testing::HasCode;
using Object = CheckpointStore::Object;

class CheckpointStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<CheckpointStore> Open(int64_t token) {
    return MakeDirectoryCheckpointStore(Path(), token);
  }
  std::string Path() const { return directory_ / "job"; }

  // What a run with this token finds.
  CheckpointStore::Found Find(int64_t token) {
    absl::StatusOr<CheckpointStore::Found> found = Open(token)->Claim();
    EXPECT_OK(found.status());
    return found.ok() ? *std::move(found) : CheckpointStore::Found();
  }

  static Object Keep(CheckpointStore& store, const std::string& contents) {
    absl::StatusOr<Object> object = store.Put(contents);
    EXPECT_OK(object.status());
    return object.ok() ? *object : Object();
  }

  std::vector<std::string> StoredObjects() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(Path() + "/objects")) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

  void FlipByte(const std::string& path, size_t index) {
    ASSERT_OK_AND_ASSIGN(std::string contents, ReadFile(path, 1 << 20));
    contents.at(index) ^= 1;
    ASSERT_OK(PublishFile(path, contents));
  }

  testing::TempDir directory_;
};

TEST_F(CheckpointStoreTest, KeepsTheTwoLastGenerations) {
  const auto store = Open(1);
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Found nothing, store->Claim());
  EXPECT_THAT(nothing.generations, IsEmpty());
  const Object layer = Keep(*store, "a layer");
  std::vector<Object> states;
  for (const char* name : {"first", "second", "third"}) {
    states.push_back(Keep(*store, name));
    ASSERT_OK(store->Commit({name, {layer, states.back()}}));
  }
  const CheckpointStore::Found found = Find(2);
  ASSERT_THAT(found.generations, SizeIs(2));
  EXPECT_EQ(found.generations[0].manifest, "third");
  EXPECT_EQ(found.generations[1].manifest, "second");
  EXPECT_EQ(found.n_damaged, 0);
  EXPECT_THAT(StoredObjects(),
              UnorderedElementsAre(layer.sha256, states[1].sha256, states[2].sha256));
  std::string contents(5, ' ');
  ASSERT_OK(store->Get(states[2], std::as_writable_bytes(std::span(contents))));
  EXPECT_EQ(contents, "third");
}

TEST_F(CheckpointStoreTest, AHolderOfBeforeCanChangeNothing) {
  const auto old_holder = Open(1);
  ASSERT_OK(old_holder->Claim());
  const Object object = Keep(*old_holder, "old");
  ASSERT_OK(old_holder->Commit({"old", {object}}));
  const auto holder = Open(2);
  ASSERT_OK(holder->Claim());
  EXPECT_THAT(old_holder->Commit({"older still", {}}), HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(old_holder->Discard(), HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(Open(1)->Claim(), HasCode(absl::StatusCode::kAborted));
  const CheckpointStore::Found found = Find(2);
  ASSERT_FALSE(found.generations.empty());
  EXPECT_EQ(found.generations[0].manifest, "old");
}

// A job that has ended has no checkpoint, and whoever wakes then makes none.
TEST_F(CheckpointStoreTest, ARemovedOneIsNotMadeAgain) {
  const auto store = Open(1);
  ASSERT_OK(store->Claim());
  ASSERT_OK(RemoveTree(Path()));
  EXPECT_THAT(store->Put("late"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(store->Commit({"late", {}}), HasCode(absl::StatusCode::kNotFound));
  EXPECT_FALSE(std::filesystem::exists(Path()));
}

TEST_F(CheckpointStoreTest, OneWriterAtATime) {
  const auto store = Open(1);
  ASSERT_OK(store->Claim());
  const int fd = open((Path() + "/lock").c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(flock(fd, LOCK_EX | LOCK_NB), 0);
  EXPECT_THAT(store->Commit({"m", {}}), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(Open(2)->Claim(), HasCode(absl::StatusCode::kUnavailable));
  close(fd);
  EXPECT_OK(store->Commit({"m", {}}));
}

TEST_F(CheckpointStoreTest, DamageIsSeen) {
  const auto store = Open(1);
  ASSERT_OK(store->Claim());
  const Object object = Keep(*store, "contents");
  ASSERT_OK(store->Commit({"first", {object}}));
  ASSERT_OK(store->Commit({"second", {object}}));
  ASSERT_OK_AND_ASSIGN(const std::string current, ReadFile(Path() + "/CURRENT", 1 << 20));
  for (size_t i = 0; i < current.size(); i += 11) {
    ASSERT_OK(PublishFile(Path() + "/CURRENT", current));
    FlipByte(Path() + "/CURRENT", i);
    const CheckpointStore::Found found = Find(1);
    ASSERT_FALSE(found.generations.empty()) << i;
    EXPECT_EQ(found.generations[0].manifest, "first") << i;
    EXPECT_EQ(found.n_damaged, 1) << i;
  }
  EXPECT_OK(store->Check(object));
  FlipByte(Path() + "/objects/" + object.sha256, 3);
  EXPECT_THAT(store->Check(object), HasCode(absl::StatusCode::kDataLoss));
  std::string contents(8, ' ');
  EXPECT_THAT(store->Get(object, std::as_writable_bytes(std::span(contents))),
              HasCode(absl::StatusCode::kDataLoss));
  Keep(*store, "contents");  // heals it
  EXPECT_OK(store->Check(object));
  std::filesystem::remove(Path() + "/objects/" + object.sha256);
  EXPECT_THAT(store->Check(object), HasCode(absl::StatusCode::kDataLoss));
}

TEST_F(CheckpointStoreTest, DiscardRemovesWhatWasNotCommitted) {
  const auto store = Open(1);
  ASSERT_OK(store->Claim());
  const Object kept = Keep(*store, "kept");
  ASSERT_OK(store->Commit({"m", {kept}}));
  Keep(*store, "put, and the disk was full");
  ASSERT_OK(PublishFile(Path() + "/objects/.x.tmp-1-1", "of a writer that died"));
  ASSERT_OK(store->Discard());
  EXPECT_THAT(StoredObjects(), UnorderedElementsAre(kept.sha256));
}

TEST_F(CheckpointStoreTest, OldOnesGo) {
  const std::string root = directory_.path();
  const auto store = MakeDirectoryCheckpointStore(root + "/job-1/family", 1);
  ASSERT_OK(store->Claim());
  ASSERT_OK(RemoveStaleCheckpoints(root, absl::Hours(1)));
  EXPECT_TRUE(std::filesystem::exists(root + "/job-1"));
  ASSERT_OK(RemoveStaleCheckpoints(root, -absl::Hours(1)));
  EXPECT_FALSE(std::filesystem::exists(root + "/job-1"));
  EXPECT_OK(RemoveStaleCheckpoints(root + "/none", absl::Hours(1)));
}

}  // namespace
}  // namespace walsh::pipeline
