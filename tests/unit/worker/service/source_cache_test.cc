#include "worker/service/source_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

class SourceCacheTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }
  void Open(int64_t bytes_max = 100) {
    absl::StatusOr<std::unique_ptr<SourceCache>> cache = SourceCache::Open(
        root_, bytes_max,
        [this](const std::string&) -> absl::StatusOr<int64_t> { return disk_bytes_; });
    ASSERT_OK(cache);
    cache_ = *std::move(cache);
  }
  absl::StatusOr<SourceCache::Pin> Get(const std::string& key, int64_t size_bytes) {
    return cache_->Get(key, size_bytes,
                       [&](const std::string& directory) {
                         ++n_fills_;
                         return PublishFile(directory + "/file", std::string(size_bytes, 'x'));
                       },
                       {});
  }
  std::vector<std::string> Folders() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(root_)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

  testing::TempDir dir_;
  const std::string root_ = dir_ / "sources";
  std::unique_ptr<SourceCache> cache_;
  int64_t disk_bytes_ = 1000;
  int n_fills_ = 0;
};

TEST_F(SourceCacheTest, FillsAFolderOnce) {
  EXPECT_THAT(cache_->Find("a").status(), HasCode(absl::StatusCode::kNotFound));
  for (int i = 0; i < 2; ++i) {
    ASSERT_OK_AND_ASSIGN(const SourceCache::Pin pin, Get("a", 10));
    EXPECT_EQ(*ReadFile(pin.directory() + "/file", 10), "xxxxxxxxxx");
  }
  EXPECT_EQ(n_fills_, 1);
  EXPECT_OK(cache_->Find("a").status());
}

TEST_F(SourceCacheTest, WhatWasNotUsedForLongestGoesFirst) {
  for (const char* key : {"a", "b", "c"}) ASSERT_OK(Get(key, 30).status());
  ASSERT_OK(Get("a", 30).status());
  ASSERT_OK(Get("d", 40).status());
  EXPECT_THAT(Folders(), UnorderedElementsAre("a", "c", "d")) << "they have the limit together";
  // Also over the end of the process.
  cache_.reset();
  fs::last_write_time(root_ + "/a", fs::file_time_type::clock::now() - std::chrono::hours(1));
  Open();
  ASSERT_OK(Get("e", 30).status());
  EXPECT_THAT(Folders(), UnorderedElementsAre("c", "d", "e"));
}

TEST_F(SourceCacheTest, WhatIsInUseStays) {
  std::optional<SourceCache::Pin> a = *Get("a", 60);
  const absl::Status no_room = Get("b", 50).status();
  EXPECT_THAT(no_room, StatusIs(absl::StatusCode::kResourceExhausted,
                                "the source within --source-cache-bytes needs 50 bytes of disk, "
                                "40 are free"));
  EXPECT_EQ(ErrorReason(no_room), "INSUFFICIENT_DISK");
  EXPECT_THAT(Folders(), ElementsAre("a"));
  a.reset();
  ASSERT_OK(Get("b", 50).status());
  EXPECT_THAT(Folders(), ElementsAre("b"));
}

TEST_F(SourceCacheTest, NothingGoesWhereItWouldNotBeEnough) {
  ASSERT_OK(Get("a", 30).status());
  ASSERT_OK_AND_ASSIGN(const SourceCache::Pin b, Get("b", 30));
  EXPECT_THAT(Get("c", 80).status(), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(Folders(), UnorderedElementsAre("a", "b"));
  disk_bytes_ = 5;
  EXPECT_THAT(Get("c", 40).status(), StatusIs(absl::StatusCode::kResourceExhausted,
                                              "the source needs 40 bytes of disk, 35 are free"));
  EXPECT_THAT(Folders(), UnorderedElementsAre("a", "b"));
}

TEST_F(SourceCacheTest, NothingFitsWhereMoreIsPromisedThanThereIs) {
  disk_bytes_ = -1;
  EXPECT_THAT(Get("a", 0).status(), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(Get("a", 1).status(), StatusIs(absl::StatusCode::kResourceExhausted,
                                             "the source needs 1 bytes of disk, 0 are free"));
}

TEST_F(SourceCacheTest, WhatAFillHasYetToWriteIsNotFree) {
  disk_bytes_ = 50;
  const auto fill = [&](const std::string& directory) {
    EXPECT_OK(PublishFile(directory + "/file", std::string(10, 'x')));
    disk_bytes_ = 40;
    EXPECT_THAT(Get("b", 11).status(), HasCode(absl::StatusCode::kResourceExhausted));
    return Get("b", 10).status();
  };
  EXPECT_OK(cache_->Get("a", 40, fill, {}).status());
}

TEST_F(SourceCacheTest, WhatIsLargerThanAllOfItIsRefusedAndCostsNothing) {
  ASSERT_OK(Get("a", 10).status());
  const absl::Status too_large = Get("b", 101).status();
  EXPECT_THAT(too_large, HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(ErrorReason(too_large), "SOURCE_TOO_LARGE");
  EXPECT_THAT(Folders(), ElementsAre("a"));
}

TEST_F(SourceCacheTest, AFailureLeavesNothing) {
  const auto fails = [](const std::string& directory) {
    EXPECT_OK(PublishFile(directory + "/file", "half"));
    return absl::UnavailableError("away");
  };
  EXPECT_THAT(cache_->Get("a", 100, fails, {}).status(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(Folders(), IsEmpty());
  EXPECT_OK(Get("a", 100).status());
}

TEST_F(SourceCacheTest, AFillThatThrowsLeavesNothing) {
  const auto throws = [](const std::string&) -> absl::Status { throw std::bad_alloc(); };
  EXPECT_THROW(cache_->Get("a", 100, throws, {}).IgnoreError(), std::bad_alloc);
  EXPECT_THAT(Folders(), IsEmpty());
  EXPECT_OK(cache_
                ->Get(
                    "a", 100, [](const std::string&) { return absl::OkStatus(); },
                    [] { return absl::CancelledError("nobody fills it"); })
                .status());
}

TEST_F(SourceCacheTest, AFolderThatCannotBePublishedLeavesNothing) {
  ASSERT_OK(MakeDirectories(root_ + "/a"));
  EXPECT_THAT(Get("a", 10).status(), HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(Folders(), IsEmpty());
  EXPECT_OK(Get("a", 10).status());
}

TEST_F(SourceCacheTest, WhatADeadProcessLeftUnfinishedGoes) {
  ASSERT_OK(Get("a", 10).status());
  ASSERT_OK(MakeDirectories(*cache_->MakeTemporaryDirectory() + "/model"));
  cache_.reset();
  Open();
  EXPECT_THAT(Folders(), ElementsAre("a"));
  EXPECT_OK(cache_->Find("a").status());
}

TEST_F(SourceCacheTest, WhatAnOperatorRemovesIsFilledAgain) {
  ASSERT_OK(Get("a", 10).status());
  ASSERT_OK(RemoveTree(root_ + "/a"));
  EXPECT_THAT(cache_->Find("a").status(), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(Get("a", 10).status());
  EXPECT_EQ(n_fills_, 2);
}

TEST_F(SourceCacheTest, WhatAnOperatorRemovesMakesRoom) {
  ASSERT_OK(Get("a", 60).status());
  ASSERT_OK(RemoveTree(root_ + "/a"));
  EXPECT_OK(Get("b", 60).status());
}

TEST_F(SourceCacheTest, TheSecondCallerWaitsForTheFirstOrGoes) {
  absl::Notification is_filling, may_end;
  std::thread first([&] {
    EXPECT_OK(cache_
                  ->Get("a", 10,
                        [&](const std::string&) {
                          is_filling.Notify();
                          may_end.WaitForNotification();
                          return absl::OkStatus();
                        },
                        {})
                  .status());
  });
  is_filling.WaitForNotification();
  EXPECT_THAT(cache_->Get("a", 10, {}, [] { return absl::CancelledError("no more"); }).status(),
              HasCode(absl::StatusCode::kCancelled));
  may_end.Notify();
  EXPECT_OK(Get("a", 10).status());
  EXPECT_EQ(n_fills_, 0);
  first.join();
}

}  // namespace
}  // namespace walsh::service
