// The keys of the public port while the service runs: which calls are let in, and who makes them.
//
// Threads: safe.
#pragma once

#include <grpcpp/server_context.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/grpc_security.h"
#include "common/periodic_task.h"
#include "common/reloaded.h"
#include "server/access/api_keys.h"

namespace walsh::access {

// Who calls. Without keys there are no tenants: everybody sees all.
struct Caller {
  std::optional<std::string> tenant;
  TenantLimits limits;
};

class AccessControl {
 public:
  // Follows the file; an empty path: no keys. Errors: those of the file.
  static absl::StatusOr<std::unique_ptr<AccessControl>> Open(const std::string& api_keys_file);

  bool has_keys() const { return keys_ != nullptr; }
  // Of the public port; null without keys.
  CallCheck check() const;
  // Of a call that the check let in. UNAUTHENTICATED when its key was taken away since.
  absl::StatusOr<Caller> CallerOf(const grpc::ServerContextBase& context) const;

 private:
  explicit AccessControl(std::unique_ptr<Reloaded<ApiKeys>> keys);

  const std::unique_ptr<Reloaded<ApiKeys>> keys_;  // null: none
  const std::unique_ptr<PeriodicTask> poll_;       // last: it uses the keys
};

}  // namespace walsh::access
