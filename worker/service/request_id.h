// By what a call is known in the logs of its client, the coordinator and the worker.
#pragma once

#include <grpcpp/server_context.h>

#include <string>

namespace walsh::service {

inline constexpr char kRequestIdHeader[] = "x-request-id";

// The client's id from the request's field, else from the header, cut to
// limits::kRequestIdBytesMax, else a random one.
std::string RequestId(const grpc::ServerContextBase& context, const std::string& field);

}  // namespace walsh::service
