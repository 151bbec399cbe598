#include "server/access/access_rules.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_security.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "walsh/internal/v1/worker.pb.h"
#include "walsh/v1/evaluation.pb.h"
#include "walsh/v1/generation.pb.h"
#include "walsh/v1/model.pb.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::access {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

// "/package.Service/Method" of all services of a file. That no file is left out,
// tests/integration/coordinator_access_test.cc sees to.
void AddMethods(const google::protobuf::FileDescriptor* file, std::vector<std::string>* methods) {
  for (int s = 0; s < file->service_count(); ++s) {
    for (int m = 0; m < file->service(s)->method_count(); ++m) {
      methods->push_back(absl::StrCat("/", file->service(s)->full_name(), "/",
                                      file->service(s)->method(m)->name()));
    }
  }
}

std::vector<std::string> PublicMethods() {
  std::vector<std::string> methods;
  AddMethods(v1::QuantizationJob::descriptor()->file(), &methods);
  AddMethods(v1::EvaluateModelRequest::descriptor()->file(), &methods);
  AddMethods(v1::GenerateRequest::descriptor()->file(), &methods);
  AddMethods(v1::Model::descriptor()->file(), &methods);
  return methods;
}

ApiKeys KeyWith(const std::string& secret, const std::string& roles) {
  auto keys = ApiKeys::Parse(absl::StrCat(R"({"keys": [{"id": "k", "tenant": "t", "sha256": ")",
                                          Sha256Hex(secret), R"(", "roles": [)", roles, "]}]}"));
  EXPECT_OK(keys);
  return keys.value_or(ApiKeys());
}

// A method that is added without a rule fails here, and is refused until it has one.
TEST(AccessRulesTest, EveryPublicMethodHasARule) {
  const std::vector<std::string> methods = PublicMethods();
  EXPECT_GE(methods.size(), 25u);
  for (const std::string& method : methods) EXPECT_NE(FindRule(method), nullptr) << method;
}

TEST(AccessRulesTest, MethodsBetweenDaemonsHaveNone) {
  std::vector<std::string> methods;
  AddMethods(walsh::internal::v1::Lease::descriptor()->file(), &methods);
  EXPECT_GE(methods.size(), 12u);
  const ApiKeys keys = KeyWith("key", R"("submit", "serve", "admin")");
  for (const std::string& method : methods) {
    EXPECT_EQ(FindRule(method), nullptr) << method;
    EXPECT_FALSE(IsOpenToAll(method)) << method;
    EXPECT_THAT(Authorize(keys, method, "Bearer key"), HasCode(absl::StatusCode::kUnimplemented));
  }
}

TEST(AccessRulesTest, NothingButHealthIsOpen) {
  const ApiKeys keys = KeyWith("key", R"("submit", "serve", "admin")");
  std::vector<std::string> methods = PublicMethods();
  methods.insert(methods.end(), {"", "/", "/no.such.Service/At", "/grpc.health.v1.HealthX/Check",
                                 "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"});
  for (const std::string& method : methods) {
    for (const char* authorization : {"", "Bearer other", "key", "Basic key", "Bearer key "}) {
      EXPECT_THAT(Authorize(keys, method, authorization),
                  HasCode(absl::StatusCode::kUnauthenticated))
          << method << " with '" << authorization << "'";
    }
  }
  EXPECT_OK(Authorize(keys, "/grpc.health.v1.Health/Check", ""));
  EXPECT_OK(Authorize(keys, "/grpc.health.v1.Health/Watch", "Bearer other"));
}

TEST(AccessRulesTest, AKeyMayDoWhatItsRolesSay) {
  const struct {
    const char* method;
    const char* role;  // null: every key
  } kCases[] = {
      {"/walsh.v1.QuantizationService/CreateQuantizationJob", "submit"},
      {"/walsh.v1.EvaluationService/EvaluateModel", "submit"},
      {"/walsh.v1.GenerationService/ChatStream", "serve"},
      {"/walsh.v1.ModelService/DeleteModel", "admin"},
      {"/walsh.v1.ModelService/ListModels", nullptr},
  };
  for (const auto& each : kCases) {
    for (const std::string role : {"submit", "serve", "admin"}) {
      const absl::Status status =
          Authorize(KeyWith("key", "\"" + role + "\""), each.method, "Bearer key");
      if (each.role == nullptr || role == each.role) {
        EXPECT_OK(status) << each.method;
      } else {
        EXPECT_THAT(status,
                    StatusIs(absl::StatusCode::kPermissionDenied,
                             HasSubstr(absl::StrCat("'", each.role, "', which ", each.method))));
      }
    }
  }
}

}  // namespace
}  // namespace walsh::access
