#include <gtest/gtest.h>

#include "tests/unit/worker/objects/object_store_conformance.h"

namespace walsh::objects {
namespace {

std::unique_ptr<ObjectStore> OpenIn(const std::string& folder) {
  return OpenObjectStore("--store", "file:" + folder + "/objects/of/it").value();
}

INSTANTIATE_TEST_SUITE_P(Directory, ObjectStoreTest, ::testing::Values(StoreFactory(OpenIn)));

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
