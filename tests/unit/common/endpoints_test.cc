#include "common/endpoints.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "common/publish.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

TEST(EndpointsTest, RoundTripsWithThePid) {
  testing::TempDir dir;
  const std::string data_dir = dir / "a/b";  // does not exist yet
  ASSERT_OK(WriteEndpoints(data_dir, "worker", {{"internal", "127.0.0.1:41"}}));
  ASSERT_OK_AND_ASSIGN(const Endpoints read, ReadEndpoints(data_dir, "worker"));
  EXPECT_EQ(read, (Endpoints{{"internal", "127.0.0.1:41"}, {"pid", std::to_string(getpid())}}));
  ASSERT_OK(WriteEndpoints(data_dir, "worker", {{"internal", "127.0.0.1:42"}}));
  EXPECT_EQ(ReadEndpoints(data_dir, "worker")->at("internal"), "127.0.0.1:42");
  RemoveEndpoints(data_dir, "worker");
  RemoveEndpoints(data_dir, "worker");
  EXPECT_THAT(ReadEndpoints(data_dir, "worker"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no worker runs")));
}

TEST(EndpointsTest, ABrokenFileIsDataLoss) {
  testing::TempDir dir;
  ASSERT_OK(MakeDirectories(dir / "run"));
  for (const char* text : {"", "{", "[1]", "\xFF"}) {
    std::ofstream(EndpointsPath(dir.path(), "coordinator")) << text;
    EXPECT_THAT(ReadEndpoints(dir.path(), "coordinator"), HasCode(absl::StatusCode::kDataLoss))
        << text;
  }
}

TEST(EndpointsTest, Ipv6HostsGetTheirBracketsOnce) {
  EXPECT_EQ(HostPort("127.0.0.1", 50051), "127.0.0.1:50051");
  EXPECT_EQ(HostPort("localhost", 0), "localhost:0");
  EXPECT_EQ(HostPort("::1", 50051), "[::1]:50051");
  EXPECT_EQ(HostPort("[::1]", 50051), "[::1]:50051");
  EXPECT_EQ(BareHost("[fe80::1]"), "fe80::1");
  EXPECT_EQ(BareHost("localhost"), "localhost");
  for (const char* host : {"::1", "[::1]", "127.0.0.2"}) EXPECT_TRUE(IsLoopbackHost(host)) << host;
  for (const char* host : {"::", "[::]", "0.0.0.0"}) {
    EXPECT_TRUE(IsWildcardHost(host)) << host;
    EXPECT_FALSE(IsLoopbackHost(host)) << host;
  }
}

TEST(EndpointsTest, DataFolderComesFromTheEnvironment) {
  testing::ScopedEnvironment home("HOME", "/h");
  testing::ScopedEnvironment xdg("XDG_DATA_HOME", nullptr);
  testing::ScopedEnvironment own("WALSH_DATA_DIR", nullptr);
  EXPECT_EQ(DefaultDataDir(), "/h/.local/share/walsh");
  testing::ScopedEnvironment xdg_set("XDG_DATA_HOME", "/x");
  EXPECT_EQ(DefaultDataDir(), "/x/walsh");
  testing::ScopedEnvironment own_set("WALSH_DATA_DIR", "/d");
  EXPECT_EQ(DefaultDataDir(), "/d");
}

}  // namespace
}  // namespace walsh
