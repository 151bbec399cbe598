#include "server/access/api_keys.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh::access {
namespace {

using nlohmann::json;

absl::Status Wrong(const std::string& where, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", what));
}

// The string of a member that must be there.
absl::StatusOr<std::string> Member(const json& object, const char* name, const std::string& where) {
  const auto member = object.find(name);
  if (member == object.end() || !member->is_string()) {
    return Wrong(where, absl::StrCat("'", name, "' must be there, and a string"));
  }
  return member->get<std::string>();
}

// As names of jobs and models: fit for logs, metrics and folders.
absl::Status CheckName(const std::string& name, const char* member, const std::string& where) {
  const bool is_name = !name.empty() && name.size() <= limits::kTenantBytesMax &&
                       std::all_of(name.begin(), name.end(), [](char c) {
                         return absl::ascii_islower(static_cast<unsigned char>(c)) ||
                                absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '-' ||
                                c == '_' || c == '.';
                       });
  if (is_name) return absl::OkStatus();
  return Wrong(where, absl::StrCat("'", member, "' must have 1 to ", limits::kTenantBytesMax,
                                   " of a-z, 0-9, '-', '_' and '.'"));
}

absl::StatusOr<SecretDigest> ParseDigest(const std::string& hex, const std::string& where) {
  SecretDigest digest;
  const bool is_hex =
      hex.size() == 2 * digest.size() && std::all_of(hex.begin(), hex.end(), [](char c) {
        return absl::ascii_isxdigit(static_cast<unsigned char>(c));
      });
  if (!is_hex) return Wrong(where, "'sha256' must have 64 hexadecimal digits");
  const std::string bytes = absl::HexStringToBytes(hex);
  std::copy(bytes.begin(), bytes.end(), digest.begin());
  return digest;
}

absl::StatusOr<std::set<Role>> ParseRoles(const json& object, const std::string& where) {
  const auto member = object.find("roles");
  if (member == object.end() || !member->is_array() || member->empty()) {
    return Wrong(where, "'roles' must be there, and a list of one at least");
  }
  std::set<Role> roles;
  for (const json& item : *member) {
    std::optional<Role> role;
    for (const Role known : {Role::kSubmit, Role::kServe, Role::kAdmin}) {
      if (item.is_string() && item.get<std::string>() == RoleName(known)) role = known;
    }
    if (!role.has_value()) return Wrong(where, "a role is 'submit', 'serve' or 'admin'");
    roles.insert(*role);
  }
  return roles;
}

absl::StatusOr<ApiKey> ParseKey(const json& object, const std::string& where) {
  if (!object.is_object()) return Wrong(where, "must be an object");
  for (const auto& [name, value] : object.items()) {
    if (name != "id" && name != "sha256" && name != "tenant" && name != "roles") {
      return Wrong(where, absl::StrCat("unknown member '", name, "'"));
    }
  }
  ApiKey key;
  WALSH_ASSIGN_OR_RETURN(key.id, Member(object, "id", where));
  WALSH_RETURN_IF_ERROR(CheckName(key.id, "id", where));
  WALSH_ASSIGN_OR_RETURN(key.tenant, Member(object, "tenant", where));
  WALSH_RETURN_IF_ERROR(CheckName(key.tenant, "tenant", where));
  WALSH_ASSIGN_OR_RETURN(const std::string hex, Member(object, "sha256", where));
  WALSH_ASSIGN_OR_RETURN(key.digest, ParseDigest(hex, where));
  WALSH_ASSIGN_OR_RETURN(key.roles, ParseRoles(object, where));
  return key;
}

// A count from 0 to `n_max`.
template <typename Count>
absl::StatusOr<Count> ParseCount(const json& value, Count n_max, const std::string& where) {
  if (value.is_number_integer() && value >= 0 && value <= n_max) return value.get<Count>();
  return Wrong(where, absl::StrCat("must be a whole number from 0 to ", n_max));
}

// What as many requests as a tenant may have could need.
constexpr int64_t kPromptsMax = int64_t{limits::kTenantRequestsMax} * limits::kPromptBytesMax;
constexpr int64_t kNewTokensMax = int64_t{limits::kTenantRequestsMax} * limits::kNewTokensMax;
constexpr int64_t kStoredBytesMax = std::numeric_limits<int64_t>::max();

absl::StatusOr<TenantLimits> ParseLimits(const json& object, const std::string& where) {
  if (!object.is_object()) return Wrong(where, "must be an object");
  TenantLimits limits;
  for (const auto& [name, value] : object.items()) {
    const std::string member = absl::StrCat(where, ".", name);
    if (name == "running_requests") {
      WALSH_ASSIGN_OR_RETURN(limits.running_requests,
                             ParseCount(value, limits::kTenantRequestsMax, member));
    } else if (name == "running_prompt_bytes") {
      WALSH_ASSIGN_OR_RETURN(limits.running_prompt_bytes, ParseCount(value, kPromptsMax, member));
    } else if (name == "running_new_tokens") {
      WALSH_ASSIGN_OR_RETURN(limits.running_new_tokens, ParseCount(value, kNewTokensMax, member));
    } else if (name == "live_jobs") {
      WALSH_ASSIGN_OR_RETURN(limits.live_jobs, ParseCount(value, limits::kQueuedJobsMax, member));
    } else if (name == "stored_bytes") {
      WALSH_ASSIGN_OR_RETURN(limits.stored_bytes, ParseCount(value, kStoredBytesMax, member));
    } else {
      return Wrong(where, absl::StrCat("unknown member '", name, "'"));
    }
  }
  return limits;
}

}  // namespace

std::string_view RoleName(Role role) {
  switch (role) {
    case Role::kSubmit:
      return "submit";
    case Role::kServe:
      return "serve";
    case Role::kAdmin:
      return "admin";
  }
  return "unknown";
}

absl::StatusOr<ApiKeys> ApiKeys::Parse(const std::string& text) {
  const json file = json::parse(text, nullptr, /*allow_exceptions=*/false);
  const bool has_tenants = file.is_object() && file.contains("tenants");
  if (!file.is_object() || file.size() != (has_tenants ? 2 : 1) || !file.contains("keys") ||
      !file["keys"].is_array() || (has_tenants && !file["tenants"].is_object())) {
    return absl::InvalidArgumentError(
        R"(the file must be JSON of the form {"keys": [...], "tenants": {...}})");
  }
  const json& entries = file["keys"];
  if (entries.size() > limits::kApiKeysMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys: ", entries.size(), " of them, at most ", limits::kApiKeysMax));
  }
  ApiKeys keys;
  std::set<std::string> ids;
  std::set<SecretDigest> digests;
  for (size_t i = 0; i < entries.size(); ++i) {
    const std::string where = absl::StrCat("keys[", i, "]");
    WALSH_ASSIGN_OR_RETURN(ApiKey key, ParseKey(entries[i], where));
    if (!ids.insert(key.id).second) return Wrong(where, "'id' is that of another key, too");
    if (!digests.insert(key.digest).second) return Wrong(where, "the key is there twice");
    keys.keys_.push_back(std::move(key));
  }
  if (!has_tenants) return keys;
  for (const auto& [tenant, object] : file["tenants"].items()) {
    const std::string where = absl::StrCat("tenants.", tenant);
    const bool is_known = std::any_of(keys.keys_.begin(), keys.keys_.end(),
                                      [&](const ApiKey& key) { return key.tenant == tenant; });
    if (!is_known) return Wrong(where, "no key is of this tenant");
    WALSH_ASSIGN_OR_RETURN(keys.tenants_[tenant], ParseLimits(object, where));
  }
  return keys;
}

absl::StatusOr<ApiKeys> ApiKeys::ReadFile(const std::string& path) {
  absl::StatusOr<std::string> text = walsh::ReadFile(path, limits::kApiKeysFileBytesMax);
  absl::StatusOr<ApiKeys> keys = text.ok() ? Parse(*text) : text.status();
  if (keys.ok()) return keys;
  return absl::Status(keys.status().code(),
                      absl::StrCat("--api-keys-file: ", keys.status().message()));
}

TenantLimits ApiKeys::LimitsOf(const std::string& tenant) const {
  const auto limits = tenants_.find(tenant);
  return limits == tenants_.end() ? TenantLimits() : limits->second;
}

const ApiKey* ApiKeys::Find(std::string_view key) const {
  const SecretDigest digest = DigestOf(key);
  const ApiKey* found = nullptr;
  for (const ApiKey& known : keys_) {
    if (SameDigest(known.digest, digest)) found = &known;
  }
  return found;
}

}  // namespace walsh::access
