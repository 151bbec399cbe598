#include "client/resource_name.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(ResourceNameTest, TakesBareAndFullNames) {
  EXPECT_EQ(FullJobName("a1"), "quantizationJobs/a1");
  EXPECT_EQ(FullJobName("quantizationJobs/a1"), "quantizationJobs/a1");
  EXPECT_EQ(FullModelName("demo"), "models/demo");
  EXPECT_EQ(FullModelName("models/demo"), "models/demo");
  EXPECT_EQ(ResourceId("models/demo"), "demo");
  EXPECT_EQ(ResourceId("demo"), "demo");
  EXPECT_EQ(ResourceId(""), "");
}

}  // namespace
}  // namespace walsh::client
