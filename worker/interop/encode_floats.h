// Floats as the scalar types of checkpoints.
//
// Errors:  FAILED_PRECONDITION  a value is beyond the type's range (tensor and value named)
// Threads: safe.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/storage_type.h"

namespace walsh::interop {

// `type` is kF32, kF16 or kBf16, rounded to nearest even; `values` are finite.
absl::StatusOr<std::vector<std::byte>> EncodeFloats(const std::string& tensor, StorageType type,
                                                    std::span<const float> values);

}  // namespace walsh::interop
