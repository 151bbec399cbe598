// The backend of a CUDA device.
//
// No CUDA header here; a build without CUDA has the same functions, which say so.
//
// Errors:  FAILED_PRECONDITION  built without CUDA, no driver, no such device, no cuBLAS on this
//                               machine, or a device that this build has no code for
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/pipeline/backend.h"

namespace walsh::pipeline {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device);

}  // namespace walsh::pipeline
