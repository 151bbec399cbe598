// CreateQuantizationJob: field checks here, the rest on a worker when one is connected, then the
// store. A worker that cannot run the job has the next one asked: one is enough.
#pragma once

#include "server/api/call.h"
#include "server/api/core.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::api {

// On the executor. Finishes the call, now or when the worker has answered; `request` and `response`
// live until then. Workers are asked for `ask_max` in all. Without a connected worker a job is
// queued unchecked, and validate_only is UNAVAILABLE; so it is when the worker is lost or too busy
// to answer in time. A job that every worker refuses is refused with what each said.
void CreateJob(Core* core, const Call& call, const access::Caller& caller, absl::Duration ask_max,
               const v1::CreateQuantizationJobRequest* request, v1::QuantizationJob* response);

}  // namespace walsh::api
