#include "server/coordinator_flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "common/command_line.h"
#include "tests/testing/scoped_environment.h"

namespace walsh {
namespace {

using ::walsh::testing::ScopedEnvironment;

std::optional<int> Parse(std::vector<const char*> arguments, CoordinatorFlags* flags) {
  arguments.insert(arguments.begin(), "walsh-coordinator");
  return ParseFlags(static_cast<int>(arguments.size()), arguments.data(), flags);
}

TEST(CoordinatorFlagsTest, Defaults) {
  CoordinatorFlags flags;
  ASSERT_EQ(Parse({}, &flags), std::nullopt);
  EXPECT_EQ(flags.server.host, "127.0.0.1");
  EXPECT_EQ(flags.server.grpc_port, 50051);
  EXPECT_EQ(flags.server.internal_port, 50052);
  EXPECT_EQ(flags.server.http_port, 8000);
  EXPECT_EQ(flags.server.metrics_port, 8002);
  EXPECT_EQ(flags.server.lease_duration, absl::Seconds(30));
  EXPECT_EQ(flags.server.heartbeat_interval, absl::Seconds(10));
  EXPECT_EQ(flags.shutdown_timeout, absl::Seconds(30));
  EXPECT_TRUE(flags.server.enable_reflection) << "a loopback address";
}

TEST(CoordinatorFlagsTest, ReflectionIsOffWhereOthersCanReachIt) {
  CoordinatorFlags flags;
  ASSERT_EQ(Parse({"--host", "0.0.0.0"}, &flags), std::nullopt);
  EXPECT_FALSE(flags.server.enable_reflection);
  CoordinatorFlags wanted;
  ASSERT_EQ(Parse({"--host", "0.0.0.0", "--enable-reflection", "true"}, &wanted), std::nullopt);
  EXPECT_TRUE(wanted.server.enable_reflection);
  CoordinatorFlags unwanted;
  ASSERT_EQ(Parse({"--enable-reflection", "false"}, &unwanted), std::nullopt);
  EXPECT_FALSE(unwanted.server.enable_reflection);
}

TEST(CoordinatorFlagsTest, EnvironmentTwins) {
  const ScopedEnvironment port("WALSH_GRPC_PORT", "1234");
  const ScopedEnvironment lease("WALSH_JOB_LEASE_SECONDS", "60");
  CoordinatorFlags flags;
  ASSERT_EQ(Parse({"--job-lease-seconds", "90"}, &flags), std::nullopt);
  EXPECT_EQ(flags.server.grpc_port, 1234);
  EXPECT_EQ(flags.server.lease_duration, absl::Seconds(90)) << "a flag beats the environment";
}

TEST(CoordinatorFlagsTest, JobStoreIsAFileOrPostgres) {
  CoordinatorFlags file;
  ASSERT_EQ(Parse({"--job-store", "sqlite:/var/lib/jobs.db"}, &file), std::nullopt);
  EXPECT_EQ(file.server.sqlite_path, "/var/lib/jobs.db");
  EXPECT_EQ(file.server.postgres_uri, "");
  CoordinatorFlags postgres;
  ASSERT_EQ(Parse({"--job-store", "postgres://walsh@db/walsh"}, &postgres), std::nullopt);
  EXPECT_EQ(postgres.server.postgres_uri, "postgres://walsh@db/walsh");
  EXPECT_EQ(postgres.server.sqlite_path, "");
}

TEST(CoordinatorFlagsTest, APasswordInTheJobStoreIsRefusedAndNotRepeated) {
  CoordinatorFlags flags;
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(Parse({"--job-store", "postgres://walsh:hunter2@db/walsh"}, &flags), kExitUsage);
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(said, ::testing::HasSubstr("PGPASSFILE"));
  EXPECT_THAT(said, ::testing::Not(::testing::HasSubstr("hunter2")));
}

TEST(CoordinatorFlagsTest, BadValuesAreUsageErrors) {
  for (const std::vector<const char*>& arguments :
       std::vector<std::vector<const char*>>{{"--grpc-port", "65536"},
                                             {"--grpc-port", "-1"},
                                             {"--job-lease-seconds", "nan"},
                                             {"--job-lease-seconds", "0"},
                                             {"--heartbeat-seconds", "nan"},
                                             {"--shutdown-timeout", "nan"},
                                             {"--max-queued-jobs", "0"},
                                             {"--job-store", "sqlite:"},
                                             {"--job-store", "/var/lib/jobs.db"},
                                             {"--log-level", "loud"},
                                             {"--log-format", "xml"},
                                             {"--heartbeat-seconds", "11"},
                                             {"--unknown"}}) {
    CoordinatorFlags flags;
    EXPECT_EQ(Parse(arguments, &flags), kExitUsage) << arguments[0];
  }
}

}  // namespace
}  // namespace walsh
