// Server and channel settings that every gRPC port of the service shares.
//
// Limits are those of common/limits.h; keepalive of clients and servers is one pair that must fit
// (a client that pings more often than the server allows is cut off with too_many_pings).
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/grpc_security.h"

namespace walsh {

// Both sides of one keepalive agreement.
struct Keepalive {
  int client_interval_ms = 20'000;
  int server_interval_ms = 30'000;
  int timeout_ms = 10'000;  // without an answer to a ping the connection is gone
  // A client that pings more often collects strikes; one more than the limit ends its connection.
  int server_min_ping_interval_ms = 10'000;
  int server_ping_strikes_max = 2;
};
inline constexpr Keepalive kKeepalive;
static_assert(kKeepalive.client_interval_ms >= 2 * kKeepalive.server_min_ping_interval_ms,
              "clients must stay clear of the server's limit, timers being late or early");

// Message, metadata, stream and keepalive limits, SO_REUSEPORT off. Also raises the process's soft
// limit of open files to its hard one.
void ApplyServerLimits(grpc::ServerBuilder& builder, const Keepalive& keepalive = kKeepalive);

// A channel with the keepalive and message limits of the pair, without TLS unless `security` has
// it. gRPC shares one connection among channels with equal arguments; another `connection` number
// gives another connection, which more than limits::kConcurrentStreamsMax streams need.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, int connection = 0,
                                           const ChannelSecurity& security = {},
                                           const Keepalive& keepalive = kKeepalive);

// gRPC's reflection library registers itself for all servers of a process that has loaded it, asked
// or not; a server whose builder went through this has none. Call once per builder.
void DisableReflection(grpc::ServerBuilder& builder);

// For every RPC of a server: the five grpc_server_* metrics, and INVALID_ARGUMENT for requests that
// do not parse (invalid UTF-8 in a string), which the callback API calls UNIMPLEMENTED. Call before
// building the server, once per builder.
void AddServerInterceptors(grpc::ServerBuilder& builder);

}  // namespace walsh
