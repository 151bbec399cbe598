// One GET of a page on the loopback, over a socket of its own.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace walsh::testing {

// Body of http://{endpoint}{path}; `endpoint` is an address of it, 127.0.0.1:port. UNAVAILABLE,
// with the beginning of the answer, unless it is answered with 200.
absl::StatusOr<std::string> HttpGet(const std::string& endpoint, const std::string& path);

}  // namespace walsh::testing
