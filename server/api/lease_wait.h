// AcquireLease: answers with a lease as soon as there is a job, or without one after the wait.
//
// No thread is held while it waits. A worker that goes away while it waits gets nothing; one that
// goes away in the moment of the grant gives the lease back at once.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "server/api/core.h"
#include "walsh/internal/v1/worker.pb.h"

namespace walsh::api {

grpc::ServerUnaryReactor* WaitForLease(grpc::CallbackServerContext* context, Core* core,
                                       const walsh::internal::v1::AcquireLeaseRequest& request,
                                       walsh::internal::v1::AcquireLeaseResponse* response);

}  // namespace walsh::api
