// The memory of a worker's device, as metrics.
//
// Threads: safe.
#pragma once

#include <string>

#include "worker/pipeline/backend.h"

namespace walsh::service {

// `device` as in JobDevice::name. Nothing for a backend without memory of its own.
void ObserveDeviceMemory(const std::string& device, const pipeline::DeviceMemory& memory);

}  // namespace walsh::service
