#include "server/access/api_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/limits.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"

namespace walsh::access {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::StatusIs;

constexpr char kSecret[] = "0123456789abcdef";

std::string Entry(const std::string& id, const std::string& secret) {
  return absl::StrCat(R"({"id": ")", id, R"(", "sha256": ")", Sha256Hex(secret),
                      R"(", "tenant": "acme", "roles": ["serve", "submit"]})");
}
std::string File(const std::string& entries) {
  return absl::StrCat(R"({"keys": [)", entries, "]}");
}

TEST(ApiKeysTest, FindsAKeyByItsSecret) {
  ASSERT_OK_AND_ASSIGN(const ApiKeys keys,
                       ApiKeys::Parse(File(Entry("a", kSecret) + "," + Entry("b", "another"))));
  const ApiKey* key = keys.Find(kSecret);
  ASSERT_NE(key, nullptr);
  EXPECT_EQ(key->id, "a");
  EXPECT_EQ(key->tenant, "acme");
  EXPECT_THAT(key->roles, ElementsAre(Role::kSubmit, Role::kServe));
  EXPECT_EQ(keys.Find(""), nullptr);
  EXPECT_EQ(keys.Find("0123456789abcdeF"), nullptr);
  EXPECT_EQ(keys.Find(Sha256Hex(kSecret)), nullptr) << "the digest is no key";
}

TEST(ApiKeysTest, AFileWithoutKeysLetsNobodyIn) {
  ASSERT_OK_AND_ASSIGN(const ApiKeys keys, ApiKeys::Parse(File("")));
  EXPECT_EQ(keys.Find(kSecret), nullptr);
}

TEST(ApiKeysTest, BadFilesNameTheEntryAndTheMember) {
  const std::string good = Entry("a", kSecret);
  const auto with = [&](const char* what, const char* instead) {
    return File(absl::StrReplaceAll(good, {{what, instead}}));
  };
  const struct {
    std::string file;
    const char* why;
  } kCases[] = {
      {"", "must be JSON"},
      {"[]", "must be JSON"},
      {R"({"keys": {}})", "must be JSON"},
      {R"({"keys": [], "more": 1})", "must be JSON"},
      {File("1"), "keys[0]: must be an object"},
      {File(good + "," + good), "keys[1]: 'id'"},
      {File(good + "," + Entry("b", kSecret)), "keys[1]: the key is there twice"},
      {with("\"id\"", "\"ID\""), "unknown member 'ID'"},
      {with("\"tenant\": \"acme\", ", ""), "'tenant' must be there"},
      {with("acme", "Acme Inc"), "'tenant' must have"},
      {with("acme", ""), "'tenant' must have"},
      {with("\"serve\"", "\"root\""), "a role is"},
      {with("\"serve\", \"submit\"", ""), "'roles' must be there"},
      {with("\"sha256\": \"", "\"sha256\": \"0"), "64 hexadecimal digits"},
      {with("\"sha256\": \"", "\"sha256\": 1, \"tenant\": \""), "'sha256' must be there"},
  };
  for (const auto& bad : kCases) {
    EXPECT_THAT(ApiKeys::Parse(bad.file),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr(bad.why), Not(HasSubstr(Sha256Hex(kSecret))))))
        << bad.file;
  }
}

TEST(ApiKeysTest, TenantsHaveTheLimitsThatTheFileGives) {
  const auto with = [](const std::string& tenants) {
    return absl::StrCat(R"({"keys": [)", Entry("a", kSecret), R"(], "tenants": )", tenants, "}");
  };
  ASSERT_OK_AND_ASSIGN(const ApiKeys keys,
                       ApiKeys::Parse(with(R"({"acme": {"running_requests": 8}})")));
  EXPECT_EQ(keys.LimitsOf("acme").running_requests, 8);
  EXPECT_EQ(keys.LimitsOf("acme").live_jobs, std::nullopt);
  EXPECT_EQ(keys.LimitsOf("other"), TenantLimits());
  EXPECT_OK(ApiKeys::Parse(with(R"({"acme": {"running_requests": 100000, "live_jobs": 0}})")));
  ASSERT_OK_AND_ASSIGN(const ApiKeys sizes,
                       ApiKeys::Parse(with(R"({"acme": {"running_prompt_bytes": 104857600000,
      "running_new_tokens": 3276800000, "stored_bytes": 9223372036854775807}})")));
  EXPECT_EQ(sizes.LimitsOf("acme"), (TenantLimits{.running_prompt_bytes = 104857600000,
                                                  .running_new_tokens = 3276800000,
                                                  .stored_bytes = 9223372036854775807}));
  const struct {
    const char* tenants;
    const char* why;
  } kCases[] = {
      {"[]", "must be JSON"},
      {R"({"nobody": {}})", "tenants.nobody: no key"},
      {R"({"acme": 1})", "tenants.acme: must be an object"},
      {R"({"acme": {"requests": 1}})", "unknown member 'requests'"},
      {R"({"acme": {"running_requests": 100001}})", "running_requests: must be a whole number"},
      {R"({"acme": {"running_requests": -1}})", "running_requests: must be a whole number"},
      {R"({"acme": {"live_jobs": 10001}})", "live_jobs: must be a whole number from 0 to 10000"},
      {R"({"acme": {"running_prompt_bytes": 104857600001}})", "from 0 to 104857600000"},
      {R"({"acme": {"running_new_tokens": 3276800001}})", "from 0 to 3276800000"},
      {R"({"acme": {"stored_bytes": 9223372036854775808}})", "stored_bytes: must be a whole"},
      {R"({"acme": {"stored_bytes": "1 GB"}})", "stored_bytes: must be a whole number"},
      {R"({"acme": {"live_jobs": 1.5}})", "live_jobs: must be a whole number"},
      {R"({"acme": {"live_jobs": 9223372036854775807}})", "live_jobs: must be a whole number"},
  };
  for (const auto& bad : kCases) {
    EXPECT_THAT(ApiKeys::Parse(with(bad.tenants)),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(bad.why)));
  }
}

TEST(ApiKeysTest, HasAsManyKeysAsTheLimitSays) {
  std::string entries;
  for (int i = 0; i < limits::kApiKeysMax; ++i) {
    absl::StrAppend(&entries, i == 0 ? "" : ",", Entry(absl::StrCat(i), absl::StrCat(i)));
  }
  EXPECT_OK(ApiKeys::Parse(File(entries)));
  EXPECT_THAT(
      ApiKeys::Parse(File(entries + "," + Entry("x", "x"))),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1001 of them, at most 1000")));
}

}  // namespace
}  // namespace walsh::access
