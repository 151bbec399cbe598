// Streams a job's events to one watcher: stored ones from where it left off, then new ones as they
// are stored, a heartbeat when nothing happens, OK after the event that ends the job.
//
// Events are read from the store only, after each notification, so there is no gap and no
// repetition between what was and what comes. A watcher costs its cursor and at most one batch of
// events; no thread is held, and one write is in flight.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <string>

#include "server/api/core.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::api {

// The reactor of the call, which gRPC owns from there. Ends with UNAVAILABLE when the server stops,
// and as other streams do when its client takes nothing for too long (fleet/stream_proxy.h).
grpc::ServerWriteReactor<v1::QuantizationJobEvent>* WatchJob(grpc::CallbackServerContext* context,
                                                             Core* core, const std::string& id,
                                                             const jobs::TenantView& view,
                                                             int64_t after_sequence);

}  // namespace walsh::api
