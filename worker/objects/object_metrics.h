// What a worker counts about its stores in buckets.
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace walsh::objects {

// All families are there before their first event.
void RegisterObjectMetrics();
// One request, of which a call may need several until one is answered.
void ObserveRequest(const std::string& method, absl::StatusCode code, absl::Duration elapsed,
                    int64_t bytes_sent, int64_t bytes_received);

}  // namespace walsh::objects
