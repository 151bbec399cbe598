#include "common/tenant_limit.h"

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"

namespace walsh {

absl::Status TenantLimitReached(const std::string& has, int64_t max) {
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("the tenant has ", has, ", at most ", max, " are taken"));
  SetErrorInfo(status, "TENANT_LIMIT");
  SetQuotaFailure(status, absl::StrCat("the tenant has ", has), absl::StrCat("at most ", max));
  return status;
}

}  // namespace walsh
