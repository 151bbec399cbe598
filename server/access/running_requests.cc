#include "server/access/running_requests.h"

#include <optional>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "common/tenant_limit.h"

namespace walsh::access {
namespace {

constexpr absl::Duration kRetry = absl::Seconds(1);

// `what` in the plural.
absl::Status CheckRoom(int64_t n_running, int64_t n_more, std::optional<int64_t> n_max,
                       const char* what) {
  if (!n_max.has_value() || n_running + n_more <= *n_max) return absl::OkStatus();
  absl::Status full = TenantLimitReached(
      absl::StrCat(n_running, " ", what, " running and asks for ", n_more, " more"), *n_max);
  if (n_more <= *n_max) SetRetryDelay(full, kRetry);
  return full;
}

}  // namespace

absl::Status RunningRequests::Begin(const Caller& caller, const RequestSize& size) {
  if (!caller.tenant.has_value()) return absl::OkStatus();
  const TenantLimits& limits = caller.limits;
  const absl::MutexLock lock(&mu_);
  const auto it = running_.find(*caller.tenant);
  Running running = it == running_.end() ? Running() : it->second;
  WALSH_RETURN_IF_ERROR(CheckRoom(running.requests, 1, limits.running_requests, "requests"));
  WALSH_RETURN_IF_ERROR(CheckRoom(running.size.prompt_bytes, size.prompt_bytes,
                                  limits.running_prompt_bytes, "bytes of prompts"));
  WALSH_RETURN_IF_ERROR(
      CheckRoom(running.size.new_tokens, size.new_tokens, limits.running_new_tokens, "new tokens"));
  ++running.requests;
  running.size.prompt_bytes += size.prompt_bytes;
  running.size.new_tokens += size.new_tokens;
  running_[*caller.tenant] = running;
  return absl::OkStatus();
}

void RunningRequests::End(const Caller& caller, const RequestSize& size) {
  if (!caller.tenant.has_value()) return;
  const absl::MutexLock lock(&mu_);
  const auto it = running_.find(*caller.tenant);
  Running& running = it->second;
  running.size.prompt_bytes -= size.prompt_bytes;
  running.size.new_tokens -= size.new_tokens;
  if (--running.requests == 0) running_.erase(it);
}

}  // namespace walsh::access
