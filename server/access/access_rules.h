// Who may call which method of the public port: one table, and nothing is allowed that is not in
// it.
#pragma once

#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "server/access/api_keys.h"

namespace walsh::access {

struct Rule {
  std::string_view method;   // "/walsh.v1.ModelService/GetModel"
  std::optional<Role> role;  // that a key must have; none: every key will do
};
// Null: there is no such method.
const Rule* FindRule(std::string_view method);

// Health checks are open to all.
//
// Errors:  UNAUTHENTICATED   no key, or one that is unknown
//          PERMISSION_DENIED the key has not the role
//          UNIMPLEMENTED     a known key calls what has no rule, and so does not exist: a client
//                            that is newer than the service looks for this code
absl::Status Authorize(const ApiKeys& keys, std::string_view method,
                       std::string_view authorization);

}  // namespace walsh::access
