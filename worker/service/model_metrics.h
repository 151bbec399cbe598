// What the model store counts: loads, their time, and the memory of what is loaded.
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace walsh::service {

void ObserveModelLoad(const std::string& model_id, absl::Duration elapsed, int64_t memory_bytes);
void CountModelLoadFailure(const std::string& model_id, absl::StatusCode code);
void ForgetModelMemory(const std::string& model_id);

}  // namespace walsh::service
