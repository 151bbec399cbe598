// What every object store promises, whatever is behind it: instantiated for each (the folder here,
// a real S3 server in tests/integration).
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "worker/objects/object_store.h"

namespace walsh::objects {

// Opens an empty store; `folder` is a new one that goes with the test.
using StoreFactory = std::function<std::unique_ptr<ObjectStore>(const std::string& folder)>;

class ObjectStoreTest : public ::testing::TestWithParam<StoreFactory> {
 protected:
  void SetUp() override { store_ = GetParam()(files_.path()); }

  std::string Read(const std::string& key) const {
    const absl::StatusOr<ObjectStore::Contents> contents = store_->Get(key, 1 << 20);
    EXPECT_OK(contents);
    return contents.ok() ? contents->bytes : "";
  }
  std::vector<std::string> Keys(const std::string& folder) const {
    std::vector<std::string> keys;
    const auto listed = store_->List(folder);
    EXPECT_OK(listed);
    if (!listed.ok()) return keys;
    for (const ObjectStore::Listed& object : *listed) keys.push_back(object.key);
    return keys;
  }

  testing::TempDir files_;
  std::unique_ptr<ObjectStore> store_;
};

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;

TEST_P(ObjectStoreTest, ReplacesAnObject) {
  ASSERT_OK_AND_ASSIGN(const std::string first, store_->Put("a/b", "one"));
  EXPECT_EQ(Read("a/b"), "one");
  ASSERT_OK_AND_ASSIGN(const std::string second, store_->Put("a/b", "another"));
  EXPECT_NE(first, second);
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Contents contents, store_->Get("a/b", 7));
  EXPECT_EQ(contents.bytes, "another");
  EXPECT_EQ(contents.version, second);
  ASSERT_OK(store_->Put("empty", ""));
  EXPECT_EQ(Read("empty"), "");
}

TEST_P(ObjectStoreTest, SaysWhatIsNotThere) {
  EXPECT_THAT(store_->Get("a", 10), HasCode(absl::StatusCode::kNotFound));
  std::byte byte;
  EXPECT_THAT(store_->ReadAt("a", 0, {&byte, 1}), HasCode(absl::StatusCode::kNotFound));
  EXPECT_OK(store_->Delete("a"));
  EXPECT_THAT(Keys("a"), IsEmpty());
}

TEST_P(ObjectStoreTest, ReadsNoMoreThanItIsTold) {
  ASSERT_OK(store_->Put("a", std::string(100'000, 'x')));
  EXPECT_THAT(store_->Get("a", 99'999), HasCode(absl::StatusCode::kResourceExhausted));
}

TEST_P(ObjectStoreTest, ReadsAPartOfAnObject) {
  ASSERT_OK(store_->Put("a", "0123456789"));
  std::string part(4, ' ');
  ASSERT_OK(store_->ReadAt("a", 3, std::as_writable_bytes(std::span(part))));
  EXPECT_EQ(part, "3456");
  EXPECT_OK(store_->ReadAt("a", 10, {}));
  EXPECT_THAT(store_->ReadAt("a", 7, std::as_writable_bytes(std::span(part))),
              HasCode(absl::StatusCode::kDataLoss));
  EXPECT_THAT(store_->ReadAt("a", 20, std::as_writable_bytes(std::span(part))),
              HasCode(absl::StatusCode::kDataLoss));
}

TEST_P(ObjectStoreTest, WritesOnlyWhereTheConditionHolds) {
  EXPECT_THAT(store_->Put("a", "x", {.must_be_version = "\"0\""}),
              HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK_AND_ASSIGN(const std::string first, store_->Put("a", "one", {.must_be_absent = true}));
  EXPECT_THAT(store_->Put("a", "two", {.must_be_absent = true}),
              HasCode(absl::StatusCode::kAborted));
  ASSERT_OK_AND_ASSIGN(const std::string second,
                       store_->Put("a", "two", {.must_be_version = first}));
  EXPECT_THAT(store_->Put("a", "three", {.must_be_version = first}),
              HasCode(absl::StatusCode::kAborted));
  EXPECT_EQ(Read("a"), "two");
  EXPECT_OK(store_->Put("a", "three", {.must_be_version = second}));
}

TEST_P(ObjectStoreTest, ListsAFolderAndNotItsNeighbours) {
  for (const char* key : {"a/1", "a/b/2", "ab/3", "a-/4"}) ASSERT_OK(store_->Put(key, "x"));
  EXPECT_THAT(Keys("a"), ElementsAre("a/1", "a/b/2"));
  ASSERT_OK_AND_ASSIGN(const std::vector<ObjectStore::Listed> listed, store_->List("a"));
  EXPECT_EQ(listed[0].size_bytes, 1);
  EXPECT_LT(absl::AbsDuration(absl::Now() - listed[0].modified), absl::Minutes(5));
  ASSERT_OK(store_->Delete("a/1"));
  EXPECT_THAT(Keys("a"), ElementsAre("a/b/2"));
}

TEST_P(ObjectStoreTest, FindsAnObjectAndNotWhatBeginsLikeIt) {
  for (const char* key : {"a/b", "a/bc", "d/e/f"}) ASSERT_OK(store_->Put(key, "xyz"));
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Listed found, store_->Find("a/b"));
  EXPECT_EQ(found.key, "a/b");
  EXPECT_EQ(found.size_bytes, 3);
  EXPECT_EQ(found.etag, (*store_->List("a"))[0].etag);
  for (const char* key : {"a", "d/e", "a/", "x"}) {
    const absl::Status status = store_->Find(key).status();
    EXPECT_TRUE(absl::IsNotFound(status) || absl::IsInvalidArgument(status)) << key << status;
  }
}

TEST_P(ObjectStoreTest, ReadsAnObjectOnlyWhileItIsTheListedOne) {
  ASSERT_OK(store_->Put("a", "one"));
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Listed listed, store_->Find("a"));
  EXPECT_NE(listed.etag, "");
  std::string read(3, ' ');
  const auto into = std::as_writable_bytes(std::span(read));
  EXPECT_OK(store_->ReadAt("a", 0, into, {.must_have_etag = listed.etag}));
  EXPECT_EQ(read, "one");
  ASSERT_OK(store_->Put("a", "two"));
  EXPECT_THAT(store_->ReadAt("a", 0, into, {.must_have_etag = listed.etag}),
              HasCode(absl::StatusCode::kAborted));
}

TEST_P(ObjectStoreTest, TakesAFileOnlyWithItsDigest) {
  ASSERT_OK(PublishFile(files_ / "file", "contents"));
  EXPECT_THAT(store_->PutFile("a", files_ / "file", Sha256Hex("others"), {}),
              HasCode(absl::StatusCode::kDataLoss));
  EXPECT_THAT(store_->Get("a", 10), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(store_->PutFile("a", files_ / "file", Sha256Hex("contents"), {}));
  EXPECT_EQ(Read("a"), "contents");
  EXPECT_THAT(store_->PutFile("b", files_ / "missing", Sha256Hex(""), {}),
              HasCode(absl::StatusCode::kNotFound));
}

TEST_P(ObjectStoreTest, ReadsAnObjectByItsDigest) {
  ASSERT_OK(store_->Put("a", "contents"));
  std::string read(8, ' ');
  const auto place = [&](int64_t offset, int64_t n) {
    return std::as_writable_bytes(std::span(read)).subspan(offset, n);
  };
  const auto use = [](std::span<const std::byte>) { return absl::OkStatus(); };
  EXPECT_OK(ReadVerified(*store_, "a", {8, Sha256Hex("contents")}, place, use));
  EXPECT_EQ(read, "contents");
  EXPECT_THAT(ReadVerified(*store_, "a", {8, Sha256Hex("another_")}, place, use),
              HasCode(absl::StatusCode::kDataLoss));
}

TEST_P(ObjectStoreTest, RefusesKeysThatCouldBePaths) {
  for (const char* key : {"", "/a", "a/", "a//b", "..", "a/../b", ".a", "a b", "a?b", "a%2f"}) {
    EXPECT_THAT(store_->Put(key, "x"), HasCode(absl::StatusCode::kInvalidArgument)) << key;
    EXPECT_THAT(store_->Get(key, 1), HasCode(absl::StatusCode::kInvalidArgument)) << key;
    EXPECT_THAT(store_->Delete(key), HasCode(absl::StatusCode::kInvalidArgument)) << key;
  }
}

}  // namespace walsh::objects
