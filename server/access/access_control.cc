#include "server/access/access_control.h"

#include <utility>

#include "common/status_macros.h"
#include "server/access/access_rules.h"

namespace walsh::access {
namespace {

std::unique_ptr<PeriodicTask> PollOf(Reloaded<ApiKeys>* keys) {
  if (keys == nullptr) return nullptr;
  return std::make_unique<PeriodicTask>(kReloadInterval, [keys] { keys->Poll(); });
}

}  // namespace

absl::StatusOr<std::unique_ptr<AccessControl>> AccessControl::Open(
    const std::string& api_keys_file) {
  std::unique_ptr<Reloaded<ApiKeys>> keys;
  if (!api_keys_file.empty()) {
    const auto load = [api_keys_file] { return ApiKeys::ReadFile(api_keys_file); };
    WALSH_ASSIGN_OR_RETURN(keys, Reloaded<ApiKeys>::Open({.name = "api_keys", .load = load}));
  }
  return std::unique_ptr<AccessControl>(new AccessControl(std::move(keys)));
}

AccessControl::AccessControl(std::unique_ptr<Reloaded<ApiKeys>> keys)
    : keys_(std::move(keys)), poll_(PollOf(keys_.get())) {}

CallCheck AccessControl::check() const {
  if (keys_ == nullptr) return nullptr;
  return [keys = keys_.get()](std::string_view method, std::string_view authorization) {
    return Authorize(*keys->Get(), method, authorization);
  };
}

absl::StatusOr<Caller> AccessControl::CallerOf(const grpc::ServerContextBase& context) const {
  if (keys_ == nullptr) return Caller();
  const std::shared_ptr<const ApiKeys> keys = keys_->Get();
  const auto header = context.client_metadata().find("authorization");
  if (header != context.client_metadata().end()) {
    const ApiKey* key = keys->Find(BearerSecret({header->second.data(), header->second.size()}));
    if (key != nullptr) return Caller{.tenant = key->tenant, .limits = keys->LimitsOf(key->tenant)};
  }
  return absl::UnauthenticatedError("the API key is not known any more");
}

}  // namespace walsh::access
