#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include "tests/unit/worker/objects/object_store_conformance.h"

namespace walsh::objects {
namespace {

std::unique_ptr<ObjectStore> OpenIn(const std::string& folder) {
  return OpenObjectStore("--store", "file:" + folder + "/objects/of/it").value();
}

INSTANTIATE_TEST_SUITE_P(Directory, ObjectStoreTest, ::testing::Values(StoreFactory(OpenIn)));

// Of a process that stands still.
TEST(DirectoryStoreTest, WaitsForALockNoLongerThanItMay) {
  testing::TempDir dir;
  ASSERT_OK_AND_ASSIGN(const auto store, OpenDirectoryStore(dir.path(), absl::Milliseconds(30)));
  ASSERT_OK(store->Put("a", "x"));
  const int fd = open((dir / ".lock").c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_EQ(flock(fd, LOCK_EX), 0);
  EXPECT_THAT(store->Put("a", "y"), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(store->Get("a", 10)->bytes, "x");
  ASSERT_OK_AND_ASSIGN(const auto patient, OpenDirectoryStore(dir.path()));
  patient->Stop();
  EXPECT_THAT(patient->Put("a", "y"), HasCode(absl::StatusCode::kCancelled));
  close(fd);
  EXPECT_OK(store->Put("a", "y"));
}

TEST(OpenObjectStoreTest, RefusesOtherLocations) {
  for (const char* location : {"", "file:", "/tmp", "http://host/bucket", "S3://bucket"}) {
    EXPECT_THAT(OpenObjectStore("--store", location),
                testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                  "--store must be file:DIR or s3://BUCKET/PREFIX"))
        << location;
  }
}

}  // namespace
}  // namespace walsh::objects
