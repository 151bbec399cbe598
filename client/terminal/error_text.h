// A status as the command prints it: one clear line, then what the service added.
//
//   error: INVALID_ARGUMENT: 1 field is wrong
//     quantization_job.config.bits: 5 is not one of 2, 3, 4, 8
//     reason: ..., retry in 5 s
#pragma once

#include <string>

#include "absl/status/status.h"

namespace walsh::client {

std::string ErrorText(const absl::Status& status);

}  // namespace walsh::client
