// RESOURCE_EXHAUSTED because memory is short, the host's or a device's. A full queue and too many
// open files have the same code, and other remedies.
//
// The mark stays in the process: it is no detail that a client gets.
#pragma once

#include <string_view>

#include "absl/status/status.h"

namespace walsh {

absl::Status OutOfMemoryError(std::string_view message);
bool IsOutOfMemory(const absl::Status& status);

}  // namespace walsh
