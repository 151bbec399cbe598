// Whether something fits on the disk, before it is begun.
//
// Errors:  RESOURCE_EXHAUSTED (ErrorInfo INSUFFICIENT_DISK) with both figures; the folder's path
// goes
//          to the log only
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace walsh::service {

// `what` begins the message: "the artifact".
absl::Status CheckDisk(std::string_view what, int64_t needed_bytes, int64_t free_bytes,
                       const std::string& directory);

}  // namespace walsh::service
