// The flags with which both daemons secure their ports and their calls to each other.
#pragma once

#include <CLI/CLI.hpp>

#include "common/grpc_security.h"

namespace walsh {

void AddDaemonSecurityFlags(CLI::App& app, DaemonSecurity::Options& options);

}  // namespace walsh
