#include "server/access/running_requests.h"

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"

namespace walsh::access {
namespace {

constexpr absl::Duration kRetry = absl::Seconds(1);

}  // namespace

absl::Status RunningRequests::Begin(const Caller& caller) {
  if (!caller.tenant.has_value()) return absl::OkStatus();
  const std::optional<int> n_max = caller.limits.running_requests;
  const absl::MutexLock lock(&mu_);
  int& n_running = n_running_[*caller.tenant];
  if (!n_max.has_value() || n_running < *n_max) {
    ++n_running;
    return absl::OkStatus();
  }
  absl::Status full = absl::ResourceExhaustedError(absl::StrCat(
      "the tenant has ", n_running, " requests running, at most ", *n_max, " are taken"));
  SetErrorInfo(full, "TENANT_LIMIT");
  SetQuotaFailure(full, "the tenant's running requests", absl::StrCat("at most ", *n_max));
  SetRetryDelay(full, kRetry);
  return full;
}

void RunningRequests::End(const Caller& caller) {
  if (!caller.tenant.has_value()) return;
  const absl::MutexLock lock(&mu_);
  const auto running = n_running_.find(*caller.tenant);
  if (--running->second == 0) n_running_.erase(running);
}

}  // namespace walsh::access
