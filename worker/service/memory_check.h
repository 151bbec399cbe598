// Whether a planned job fits into the memory of this worker and of the device that it runs jobs on,
// and an evaluation into that of the worker.
//
// Errors: FAILED_PRECONDITION with reason INSUFFICIENT_MEMORY: it could not even if all were free
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/service/host_memory.h"

namespace walsh::service {

struct WorkerMemory {
  HostMemory host;
  pipeline::DeviceMemory device;
  std::string device_name;  // of messages
};

inline constexpr char kInsufficientMemory[] = "INSUFFICIENT_MEMORY";
absl::Status CheckMemory(const pipeline::JobPlan& plan, const WorkerMemory& memory);
absl::Status CheckEvaluationMemory(int64_t bytes_needed, const HostMemory& memory);
// What must become free before the job can run, one text for each memory.
std::vector<std::string> MemoryWarnings(const pipeline::JobPlan& plan, const WorkerMemory& memory);

}  // namespace walsh::service
