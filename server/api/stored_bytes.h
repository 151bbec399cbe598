// What a tenant's models take of the workers' disks.
//
// A model is of the tenant whose job made it, for as long as both are there.
//
// Threads: safe. Reads the job store.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "server/access/access_control.h"
#include "server/api/core.h"

namespace walsh::api {

// For another job of the caller: RESOURCE_EXHAUSTED (TENANT_LIMIT) when its models have reached its
// limit. What its jobs make that have not ended is not known yet.
absl::Status CheckStoredBytes(const Core& core, const access::Caller& caller);
// For the deletion of a job of the caller: FAILED_PRECONDITION (MODEL_EXISTS) while a model is
// there that counts by this job.
absl::Status CheckCountsNoModel(const Core& core, const access::Caller& caller,
                                const std::string& job_id);

}  // namespace walsh::api
