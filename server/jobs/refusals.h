// Workers that cannot run a job, and what becomes of a job that none can run.
//
// A refusal is about the worker: too little memory, an architecture or a shape that its device or
// its version does not take. Another worker may run the same job.
#pragma once

#include <map>
#include <string>

#include "absl/status/status.h"

namespace walsh::jobs {

// By worker, "workers/{id}": the error with which it refused the job.
using Refusals = std::map<std::string, absl::Status>;

// Whether a worker's error about a job that it looked at is such a refusal: UNIMPLEMENTED, or with
// reason INSUFFICIENT_MEMORY, INSUFFICIENT_DISK or DEVICE_BROKEN.
bool IsRefusal(const absl::Status& error);

// Each worker beside what it said, workers that said the same together.
std::string Summary(const Refusals& refusals);

// The error of a job that every worker has refused, with their Summary; `refusals` is not empty.
// Code and reason (ErrorInfo) are those of all of them; where they differ, a code that may pass
// before FAILED_PRECONDITION, and NO_SUITABLE_WORKER. The details of a single refusal are kept.
// RetryInfo goes with a code that may pass, PreconditionFailure with FAILED_PRECONDITION.
absl::Status RefusedByAll(const Refusals& refusals);

}  // namespace walsh::jobs
