// Where a daemon listens, written under its data folder so that `--port 0` works everywhere.
//
// <data-dir>/run/<daemon>.json: {"pid": 1, "grpc": "127.0.0.1:50051", "internal": …, "http": …,
// "metrics": …}. Written once all ports are bound, removed on a clean exit.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

using Endpoints = std::map<std::string, std::string>;

std::string EndpointsPath(const std::string& data_dir, const std::string& daemon);
absl::Status WriteEndpoints(const std::string& data_dir, const std::string& daemon,
                            const Endpoints& endpoints);
absl::StatusOr<Endpoints> ReadEndpoints(const std::string& data_dir, const std::string& daemon);
void RemoveEndpoints(const std::string& data_dir, const std::string& daemon);

// $WALSH_DATA_DIR, else $XDG_DATA_HOME/walsh, else ~/.local/share/walsh.
std::string DefaultDataDir();

// "host:port"; an IPv6 address, given with or without brackets, gets them.
std::string HostPort(std::string_view host, int port);
// `host` without the brackets of an IPv6 address, as sockets want it.
std::string_view BareHost(std::string_view host);
// The host of "host:port", without brackets.
std::string_view HostOf(std::string_view address);

// Whether a --host is reached from this machine only, or stands for all of its addresses.
bool IsLoopbackHost(std::string_view host);
bool IsWildcardHost(std::string_view host);

}  // namespace walsh
