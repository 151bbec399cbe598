#include "worker/pipeline/object_checkpoint_store.h"

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/pipeline/object_checkpoints.h"

namespace walsh::pipeline {
namespace {

class DirectoryCheckpoints final : public CheckpointPlace {
 public:
  explicit DirectoryCheckpoints(std::string directory) : directory_(std::move(directory)) {}
  std::unique_ptr<CheckpointStore> Open(int64_t token) override {
    return MakeDirectoryCheckpointStore(directory_, token);
  }
  absl::Status Remove() override { return RemoveTree(directory_); }

 private:
  const std::string directory_;
};

std::unique_ptr<CheckpointPlace> InDirectory(const std::string& folder) {
  return std::make_unique<DirectoryCheckpoints>(folder + "/job");
}
std::unique_ptr<CheckpointPlace> InObjects(const std::string& folder) {
  return std::make_unique<ObjectCheckpoints>(objects::OpenDirectoryStore(folder).value());
}

INSTANTIATE_TEST_SUITE_P(Places, CheckpointPlaceTest,
                         ::testing::Values(CheckpointPlaceFactory(InDirectory),
                                           CheckpointPlaceFactory(InObjects)));

using ::walsh::testing::HasCode;

class ObjectCheckpointStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<CheckpointStore> Open(int64_t token) {
    return MakeObjectCheckpointStore(objects_.get(), "job-1", "family", token);
  }
  std::string Path(const std::string& name) const {
    return directory_ / ("checkpoints/job-1/family/" + name);
  }
  void FlipByte(const std::string& path, size_t index) {
    ASSERT_OK_AND_ASSIGN(std::string contents, ReadFile(path, 1 << 20));
    contents.at(index) ^= 1;
    ASSERT_OK(PublishFile(path, contents));
  }

  testing::TempDir directory_;
  std::unique_ptr<objects::ObjectStore> objects_ =
      objects::OpenDirectoryStore(directory_.path()).value();
};

TEST_F(ObjectCheckpointStoreTest, DamageIsSeen) {
  const auto store = Open(1);
  ASSERT_OK(store->Claim());
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Object object, store->Put("contents"));
  ASSERT_OK(store->Commit({"first", {object}}));
  ASSERT_OK(store->Commit({"second", {object}}));
  FlipByte(Path("objects/" + object.sha256), 3);
  EXPECT_THAT(store->Check(object), HasCode(absl::StatusCode::kDataLoss));
  ASSERT_OK(store->Put("contents"));  // heals it
  EXPECT_OK(store->Check(object));

  // The newest generation: the one before is found.
  for (const auto& entry : std::filesystem::directory_iterator(Path("objects"))) {
    const std::string text = ReadFile(entry.path(), 1 << 20).value_or("");
    if (text.find("second") != std::string::npos) FlipByte(entry.path(), 70);
  }
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Found found, Open(2)->Claim());
  ASSERT_EQ(found.generations.size(), 1);
  EXPECT_EQ(found.generations[0].manifest, "first");
  EXPECT_EQ(found.n_damaged, 1);

  // What tells of both: there is nothing, but the next holder can claim it.
  FlipByte(Path("CURRENT"), 70);
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Found nothing, Open(3)->Claim());
  EXPECT_TRUE(nothing.generations.empty());
  EXPECT_EQ(nothing.n_damaged, 1);
}

TEST_F(ObjectCheckpointStoreTest, OneOfTwoWritersWithTheSameTokenGoesOn) {
  const auto first = Open(1);
  ASSERT_OK(first->Claim());
  ASSERT_OK(first->Commit({"a", {}}));
  const auto second = Open(1);
  ASSERT_OK(second->Claim());
  ASSERT_OK(second->Commit({"b", {}}));
  EXPECT_THAT(first->Commit({"c", {}}), HasCode(absl::StatusCode::kUnavailable));
}

// Whose parts cannot be read while it is away, as at the end of a request's tries. Another worker
// may do something after a list.
class StoreThatGoes final : public objects::ObjectStore {
 public:
  explicit StoreThatGoes(objects::ObjectStore* store) : store_(*store) {}
  absl::StatusOr<Contents> Get(const std::string& key, int64_t bytes_max,
                               const KeepGoing& keep_going) const override {
    return store_.Get(key, bytes_max, keep_going);
  }
  absl::Status ReadAt(const std::string& key, int64_t offset, std::span<std::byte> into,
                      const objects::ReadOptions& options) const override {
    return is_away ? absl::UnavailableError("away") : store_.ReadAt(key, offset, into, options);
  }
  absl::StatusOr<std::string> Put(const std::string& key, std::string_view contents,
                                  const objects::WriteCondition& condition) override {
    return store_.Put(key, contents, condition);
  }
  absl::Status PutFile(const std::string& key, const std::string& path, const std::string& sha256,
                       const KeepGoing& keep_going) override {
    return store_.PutFile(key, path, sha256, keep_going);
  }
  absl::StatusOr<std::vector<Listed>> List(const std::string& folder,
                                           const KeepGoing& keep_going) const override {
    absl::StatusOr<std::vector<Listed>> listed = store_.List(folder, keep_going);
    if (after_list) after_list();
    return listed;
  }
  absl::StatusOr<Listed> Find(const std::string& key, const KeepGoing& keep_going) const override {
    return store_.Find(key, keep_going);
  }
  absl::Status Delete(const std::string& key) override { return store_.Delete(key); }
  void Stop() override {}

  bool is_away = false;
  std::function<void()> after_list;

 private:
  objects::ObjectStore& store_;
};

// What could not be read is neither damaged nor thrown away.
TEST_F(ObjectCheckpointStoreTest, AStoreThatIsAwayCostsNothingOfWhatItHas) {
  const auto before = Open(1);
  ASSERT_OK(before->Claim());
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Object object, before->Put("contents"));
  ASSERT_OK(before->Commit({"first", {object}}));

  StoreThatGoes goes(objects_.get());
  goes.is_away = true;
  const auto store = MakeObjectCheckpointStore(&goes, "job-1", "family", 2);
  EXPECT_THAT(store->Claim(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_OK(store->Discard());
  EXPECT_THAT(store->Check(object), HasCode(absl::StatusCode::kUnavailable));

  goes.is_away = false;
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Found found, store->Claim());
  ASSERT_EQ(found.generations.size(), 1);
  EXPECT_EQ(found.generations[0].manifest, "first");
  EXPECT_OK(store->Check(object));
}

TEST_F(ObjectCheckpointStoreTest, OldOnesGo) {
  ASSERT_OK(Open(1)->Claim());
  ASSERT_OK(RemoveStaleObjectCheckpoints(*objects_, absl::Hours(1)));
  EXPECT_TRUE(std::filesystem::exists(Path("CURRENT")));
  ASSERT_OK(RemoveStaleObjectCheckpoints(*objects_, -absl::Hours(1)));
  EXPECT_FALSE(std::filesystem::exists(Path("CURRENT")));
}

TEST_F(ObjectCheckpointStoreTest, OneThatIsResumedMeanwhileStays) {
  const auto before = Open(1);
  ASSERT_OK(before->Claim());
  ASSERT_OK_AND_ASSIGN(const CheckpointStore::Object object, before->Put("contents"));
  ASSERT_OK(before->Commit({"first", {object}}));
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory_.path())) {
    std::filesystem::last_write_time(
        entry, std::filesystem::file_time_type::clock::now() - std::chrono::hours(2));
  }
  const auto resumed = Open(2);
  StoreThatGoes listed(objects_.get());
  bool is_first = true;
  listed.after_list = [&] {
    if (!std::exchange(is_first, false)) return;
    EXPECT_OK(resumed->Claim());
  };
  ASSERT_OK(RemoveStaleObjectCheckpoints(listed, absl::Hours(1)));
  EXPECT_OK(resumed->Check(object));
  EXPECT_OK(resumed->Commit({"second", {object}}));
}

}  // namespace
}  // namespace walsh::pipeline
