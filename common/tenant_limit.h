// The refusal of what would be more than a tenant may have.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace walsh {

// RESOURCE_EXHAUSTED (ErrorInfo TENANT_LIMIT, QuotaFailure). `has`: the value and of what,
// "2 requests running".
absl::Status TenantLimitReached(const std::string& has, int64_t max);

}  // namespace walsh
