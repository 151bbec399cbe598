#include "worker/service/memory_check.h"

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace walsh::service {
namespace {

// A total of 0 is one that the system does not tell.
absl::Status CheckTotal(const std::string& who, int64_t needed, int64_t total,
                        const std::string& kind, const std::string& owner) {
  if (total == 0 || needed <= total) return absl::OkStatus();
  absl::Status status = absl::FailedPreconditionError(
      absl::StrCat(who, " needs ", needed, " bytes of ", kind, ", ", owner, " has ", total));
  SetErrorInfo(
      status, kInsufficientMemory,
      {{"needed", absl::StrCat(needed)}, {"total", absl::StrCat(total)}, {"memory", kind}});
  return status;
}

}  // namespace

absl::Status CheckMemory(const pipeline::JobPlan& plan, const WorkerMemory& memory) {
  WALSH_RETURN_IF_ERROR(CheckTotal("the job", plan.memory_bytes_needed, memory.host.total_bytes,
                                   "memory", "the worker"));
  return CheckTotal("the job", plan.device_memory_bytes_needed, memory.device.total_bytes,
                    "device memory", memory.device_name);
}

absl::Status CheckEvaluationMemory(int64_t bytes_needed, const HostMemory& memory) {
  return CheckTotal("the evaluation", bytes_needed, memory.total_bytes, "memory", "the worker");
}

std::vector<std::string> MemoryWarnings(const pipeline::JobPlan& plan, const WorkerMemory& memory) {
  std::vector<std::string> warnings;
  if (plan.memory_bytes_needed > memory.host.free_bytes) {
    warnings.push_back(absl::StrCat("the job needs ", plan.memory_bytes_needed,
                                    " bytes of memory, of which ", memory.host.free_bytes,
                                    " are free now"));
  }
  if (plan.device_memory_bytes_needed > memory.device.free_bytes) {
    warnings.push_back(absl::StrCat("the job needs ", plan.device_memory_bytes_needed,
                                    " bytes of memory on ", memory.device_name, ", of which ",
                                    memory.device.free_bytes, " are free now"));
  }
  return warnings;
}

}  // namespace walsh::service
