// How this command proves to a service who it is, and the service to it.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "common/grpc_security.h"

namespace walsh::client {

struct SecurityFlags {
  TlsFiles tls;
  std::string api_key_file;
};
void AddSecurityFlags(CLI::App& app, SecurityFlags& flags);

// Reads the files and $WALSH_API_KEY; a key is never the value of a flag, which all users of a
// machine can see. INVALID_ARGUMENT for both at once, and for a key that would leave this machine
// without TLS; those of the files, naming their flags.
absl::StatusOr<ChannelSecurity> ReadSecurity(const SecurityFlags& flags,
                                             const std::string& address);

}  // namespace walsh::client
