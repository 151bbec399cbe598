#include "client/address.h"

#include <gtest/gtest.h>

#include "common/endpoints.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::client {
namespace {

TEST(ResolveAddressTest, PrefersWhatWasAskedFor) {
  const testing::TempDir dir;
  ASSERT_OK(WriteEndpoints(dir.path(), "coordinator", {{"grpc", "127.0.0.1:4711"}}));
  EXPECT_EQ(ResolveAddress("host:1", dir.path()), "host:1");
}

TEST(ResolveAddressTest, FindsTheCoordinatorOfTheDataFolder) {
  const testing::TempDir dir;
  ASSERT_OK(WriteEndpoints(dir.path(), "coordinator", {{"grpc", "127.0.0.1:4711"}}));
  EXPECT_EQ(ResolveAddress("", dir.path()), "127.0.0.1:4711");
}

TEST(ResolveAddressTest, FallsBackToTheUsualPort) {
  const testing::TempDir dir;
  EXPECT_EQ(ResolveAddress("", dir.path()), "127.0.0.1:50051");
  ASSERT_OK(WriteEndpoints(dir.path(), "coordinator", {{"http", "127.0.0.1:8000"}}));
  EXPECT_EQ(ResolveAddress("", dir.path()), "127.0.0.1:50051");
}

TEST(IsLoopbackTest, KnowsThisMachine) {
  for (const char* address : {"127.0.0.1:50051", "127.1.2.3:1", "localhost:1", "localhost",
                              "[::1]:1", "::1", "unix:/run/walsh"}) {
    EXPECT_TRUE(IsLoopback(address)) << address;
  }
  for (const char* address :
       {"10.0.0.1:50051", "localhost.example.org:1", "example.org:1", "[2001:db8::1]:1",
        "1127.0.0.1:1", "127.0.0.1.example.org:1", "127.example.org"}) {
    EXPECT_FALSE(IsLoopback(address)) << address;
  }
}

}  // namespace
}  // namespace walsh::client
