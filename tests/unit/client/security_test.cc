#include "client/security.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/publish.h"
#include "tests/testing/certificates.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::StatusIs;

constexpr char kKey[] = "0123456789abcdef";
constexpr char kHere[] = "127.0.0.1:50051";
constexpr char kElsewhere[] = "walsh.example.org:50051";

class ReadSecurityTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& contents) const {
    EXPECT_OK(PublishFile(dir_ / name, contents));
    return dir_ / name;
  }

  const ScopedEnvironment no_key_{"WALSH_API_KEY", nullptr};
  const testing::TempDir dir_;
};

TEST_F(ReadSecurityTest, NothingGivenIsPlain) {
  ASSERT_OK_AND_ASSIGN(const ChannelSecurity security, ReadSecurity({}, kElsewhere));
  EXPECT_FALSE(security.has_tls());
  EXPECT_EQ(security.secret, "");
}

TEST_F(ReadSecurityTest, AKeyComesFromAFileOrTheEnvironment) {
  SecurityFlags flags;
  flags.api_key_file = Write("key", std::string(kKey) + "\n");
  ASSERT_OK_AND_ASSIGN(const ChannelSecurity of_file, ReadSecurity(flags, kHere));
  EXPECT_EQ(of_file.secret, kKey);
  const ScopedEnvironment key("WALSH_API_KEY", kKey);
  ASSERT_OK_AND_ASSIGN(const ChannelSecurity of_environment, ReadSecurity({}, kHere));
  EXPECT_EQ(of_environment.secret, kKey);
  EXPECT_THAT(ReadSecurity(flags, kHere),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("cannot both")));
}

TEST_F(ReadSecurityTest, AKeyLeavesThisMachineOverTlsOnly) {
  const ScopedEnvironment key("WALSH_API_KEY", kKey);
  EXPECT_THAT(ReadSecurity({}, kElsewhere),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("--tls-ca"), Not(HasSubstr(kKey)))));
  SecurityFlags flags;
  flags.tls.ca = Write("ca.crt", testing::CertificateAuthority().pem());
  ASSERT_OK_AND_ASSIGN(const ChannelSecurity security, ReadSecurity(flags, kElsewhere));
  EXPECT_TRUE(security.has_tls());
}

TEST_F(ReadSecurityTest, WhatCannotBeUsedNamesItsFlag) {
  SecurityFlags two_keys;
  two_keys.api_key_file = Write("keys", std::string(kKey) + "\nfedcba9876543210\n");
  EXPECT_THAT(ReadSecurity(two_keys, kHere),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--api-key-file")));
  SecurityFlags no_ca;
  no_ca.tls.certificate = no_ca.tls.private_key = "x";
  EXPECT_THAT(ReadSecurity(no_ca, kHere),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls-cert needs --tls-ca")));
  const ScopedEnvironment short_key("WALSH_API_KEY", "canary");
  EXPECT_THAT(ReadSecurity({}, kHere),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("WALSH_API_KEY"), Not(HasSubstr("canary")))));
}

}  // namespace
}  // namespace walsh::client
