#include "common/bearer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/limits.h"
#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

TEST(BearerTest, HeaderThereAndBack) {
  EXPECT_EQ(BearerHeader("secret"), "Bearer secret");
  EXPECT_EQ(BearerSecret("Bearer secret"), "secret");
  EXPECT_EQ(BearerSecret("bearer secret"), "secret");
  for (const char* other : {"", "Bearer", "Bearer ", "Basic secret", "secret", "Bearersecret"}) {
    EXPECT_EQ(BearerSecret(other), "") << other;
  }
}

TEST(BearerTest, SecretsAreLongAndPrintable) {
  EXPECT_OK(CheckSecret(std::string(limits::kSecretBytesMin, 'x')));
  EXPECT_OK(CheckSecret(std::string(limits::kSecretBytesMax, 'x')));
  for (const std::string& bad :
       {std::string(), std::string(limits::kSecretBytesMin - 1, 'x'),
        std::string(limits::kSecretBytesMax + 1, 'x'), std::string(20, ' '), std::string(20, '\0'),
        std::string("0123456789abcde\r\nx-evil: 1"), std::string("0123456789abcdef\xc3\xa9")}) {
    EXPECT_THAT(CheckSecret(bad), HasCode(absl::StatusCode::kInvalidArgument));
  }
}

TEST(BearerTest, DigestsTellSecretsApart) {
  EXPECT_TRUE(SameDigest(DigestOf("a"), DigestOf("a")));
  EXPECT_FALSE(SameDigest(DigestOf("a"), DigestOf("b")));
  EXPECT_FALSE(SameDigest(DigestOf(""), DigestOf("a")));
}

TEST(BearerTest, AFileHasOneSecretALine) {
  const testing::TempDir dir;
  const std::string path = dir / "token";
  ASSERT_OK(PublishFile(path, "# from May\r\n0123456789abcdef\r\n\n  fedcba9876543210 \n"));
  ASSERT_OK_AND_ASSIGN(const std::vector<std::string> secrets, ReadSecrets(path));
  EXPECT_THAT(secrets, ElementsAre("0123456789abcdef", "fedcba9876543210"));
  ASSERT_OK(PublishFile(path, "# none\n"));
  EXPECT_THAT(ReadSecrets(path), HasCode(absl::StatusCode::kInvalidArgument));
  ASSERT_OK(PublishFile(path, "canary\n"));
  EXPECT_THAT(ReadSecrets(path),
              StatusIs(absl::StatusCode::kInvalidArgument, Not(HasSubstr("canary"))));
}

}  // namespace
}  // namespace walsh
