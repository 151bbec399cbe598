#include "server/access/access_rules.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/bearer.h"
#include "common/grpc_security.h"

namespace walsh::access {
namespace {

constexpr std::optional<Role> kEveryKey = std::nullopt;

constexpr Rule kRules[] = {
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", kEveryKey},

    {"/walsh.v1.QuantizationService/CreateQuantizationJob", Role::kSubmit},
    {"/walsh.v1.QuantizationService/GetQuantizationJob", Role::kSubmit},
    {"/walsh.v1.QuantizationService/ListQuantizationJobs", Role::kSubmit},
    {"/walsh.v1.QuantizationService/WatchQuantizationJob", Role::kSubmit},
    {"/walsh.v1.QuantizationService/CancelQuantizationJob", Role::kSubmit},
    {"/walsh.v1.QuantizationService/DeleteQuantizationJob", Role::kSubmit},
    {"/walsh.v1.QuantizationService/ListSupportedArchitectures", kEveryKey},
    {"/walsh.v1.QuantizationService/ListQuantizationPresets", kEveryKey},

    {"/walsh.v1.EvaluationService/EvaluateModel", Role::kSubmit},

    {"/walsh.v1.GenerationService/Generate", Role::kServe},
    {"/walsh.v1.GenerationService/GenerateStream", Role::kServe},
    {"/walsh.v1.GenerationService/Chat", Role::kServe},
    {"/walsh.v1.GenerationService/ChatStream", Role::kServe},
    {"/walsh.v1.GenerationService/Tokenize", Role::kServe},
    {"/walsh.v1.GenerationService/Detokenize", Role::kServe},

    {"/walsh.v1.ModelService/ListModels", kEveryKey},
    {"/walsh.v1.ModelService/GetModel", kEveryKey},
    {"/walsh.v1.ModelService/ListWorkers", kEveryKey},
    {"/walsh.v1.ModelService/LoadModel", Role::kAdmin},
    {"/walsh.v1.ModelService/UnloadModel", Role::kAdmin},
    {"/walsh.v1.ModelService/DeleteModel", Role::kAdmin},
    {"/walsh.v1.ModelService/ExportModel", Role::kAdmin},
    {"/walsh.v1.ModelService/ImportModel", Role::kAdmin},
    {"/walsh.v1.ModelService/SetModelAlias", Role::kAdmin},
    {"/walsh.v1.ModelService/DeleteModelAlias", Role::kAdmin},
};

}  // namespace

const Rule* FindRule(std::string_view method) {
  const auto* rule = std::find_if(std::begin(kRules), std::end(kRules),
                                  [&](const Rule& r) { return r.method == method; });
  return rule == std::end(kRules) ? nullptr : rule;
}

absl::Status Authorize(const ApiKeys& keys, std::string_view method,
                       std::string_view authorization) {
  if (IsOpenToAll(method)) return absl::OkStatus();
  const std::string_view secret = BearerSecret(authorization);
  if (secret.empty()) {
    return absl::UnauthenticatedError("an API key is needed, as 'authorization: Bearer KEY'");
  }
  const ApiKey* key = keys.Find(secret);
  if (key == nullptr) return absl::UnauthenticatedError("the API key is not known");
  const Rule* rule = FindRule(method);
  if (rule == nullptr) return absl::UnimplementedError("the service has no such method");
  if (!rule->role.has_value() || key->roles.contains(*rule->role)) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat("the API key has not the role '",
                                                  std::string(RoleName(*rule->role)), "', which ",
                                                  std::string(rule->method), " needs"));
}

}  // namespace walsh::access
