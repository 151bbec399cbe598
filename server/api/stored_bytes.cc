#include "server/api/stored_bytes.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/tenant_limit.h"

namespace walsh::api {
absl::Status CheckStoredBytes(const Core& core, const access::Caller& caller) {
  if (!caller.limits.stored_bytes.has_value()) return absl::OkStatus();
  int64_t n_bytes = 0;
  for (const v1::Model& model : core.catalog->Rows()) {
    const absl::StatusOr<std::string> job = ParseJobName("job", model.quantization_job());
    if (!job.ok()) continue;  // an imported one
    const absl::Status found = core.queue->Get(*job, caller.tenant).status();
    if (found.ok()) {
      n_bytes += model.size_bytes();
    } else if (!absl::IsNotFound(found)) {
      return found;
    }
  }
  if (n_bytes < *caller.limits.stored_bytes) return absl::OkStatus();
  return TenantLimitReached(absl::StrCat(n_bytes, " bytes of models stored"),
                            *caller.limits.stored_bytes);
}

absl::Status CheckCountsNoModel(const Core& core, const access::Caller& caller,
                                const std::string& job_id) {
  if (!caller.limits.stored_bytes.has_value()) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const v1::QuantizationJob asked, core.queue->Get(job_id, caller.tenant));
  const std::string job = JobName(job_id);
  if (!jobs::IsTerminal(asked.state())) {
    // Before it is deleted it may end, and with a model.
    return absl::FailedPreconditionError(absl::StrCat(job, " is ",
                                                      std::string(jobs::StateName(asked.state())),
                                                      "; cancel it, or wait for its end"));
  }
  for (const v1::Model& model : core.catalog->Rows()) {
    if (model.quantization_job() != job) continue;
    absl::Status status = absl::FailedPreconditionError(
        absl::StrCat(job, " made ", model.name(),
                     ", which counts among the tenant's stored bytes: delete the model first"));
    SetErrorInfo(status, "MODEL_EXISTS");
    SetPreconditionFailure(status, "MODEL_EXISTS", model.name(), "the model must not be there");
    return status;
  }
  return absl::OkStatus();
}

}  // namespace walsh::api
