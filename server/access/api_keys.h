// The keys of clients, as --api-keys-file has them:
//
//   {"keys": [{"id": "ci", "sha256": "9f86…", "tenant": "acme", "roles": ["submit", "serve"]}],
//    "tenants": {"acme": {"running_requests": 8, "stored_bytes": 500000000000}}}
//
// `sha256` is the digest of the key, in 64 hexadecimal digits: whoever reads the file cannot call
// the service. `id` is what logs call the key. Roles are of their own: none contains another.
// Tenants, and members of theirs, that are left out have no limits of their own.
//
// Errors:  INVALID_ARGUMENT names the entry and what is wrong with it; unknown members are errors,
//          since a slip of the pen must not widen what a key may do. Never names a digest.
// Threads: safe, as nothing changes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/bearer.h"

namespace walsh::access {

enum class Role {
  kSubmit,  // quantization jobs and evaluations
  kServe,   // generation
  kAdmin,   // models: load, unload, delete, aliases, exports, imports
};
std::string_view RoleName(Role role);

struct ApiKey {
  std::string id;
  SecretDigest digest{};
  std::string tenant;
  std::set<Role> roles;

  bool operator==(const ApiKey&) const = default;
};

// Absent: no limit but the service's.
struct TenantLimits {
  std::optional<int> running_requests;          // generation and tokenization
  std::optional<int64_t> running_prompt_bytes;  // of those; a token id has 4
  std::optional<int64_t> running_new_tokens;    // that those may still ask for
  std::optional<int> live_jobs;                 // not ended
  std::optional<int64_t> stored_bytes;          // of the models that its jobs made

  bool operator==(const TenantLimits&) const = default;
};

class ApiKeys {
 public:
  static absl::StatusOr<ApiKeys> Parse(const std::string& json);
  static absl::StatusOr<ApiKeys> ReadFile(const std::string& path);

  // Null: no such key. Takes a time that depends on the number of keys only.
  const ApiKey* Find(std::string_view key) const;
  TenantLimits LimitsOf(const std::string& tenant) const;
  bool operator==(const ApiKeys&) const = default;

 private:
  std::vector<ApiKey> keys_;
  std::map<std::string, TenantLimits> tenants_;
};

}  // namespace walsh::access
