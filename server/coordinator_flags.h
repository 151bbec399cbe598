// The command line of walsh-coordinator.
#pragma once

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "common/log.h"
#include "server/server.h"

namespace walsh {

struct CoordinatorFlags {
  ServerOptions server;
  absl::Duration shutdown_timeout = absl::Seconds(30);
  log::Format log_format = log::Format::kText;
  log::Level log_level = log::Level::kInfo;
};

// Parses into `flags`; an exit code when the process should end now.
std::optional<int> ParseFlags(int argc, const char* const* argv, CoordinatorFlags* flags);

}  // namespace walsh
