// Whether pointers begin where vector loads and bulk copies want them to.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace walsh::kernels::cuda {

struct AlignedPointer {
  const char* name;
  const void* address;     // null is aligned
  int64_t alignment = 16;  // bytes
};
// INVALID_ARGUMENT names the operation, the first that is not, and by how many bytes.
inline absl::Status CheckAlignment(const char* operation,
                                   std::initializer_list<AlignedPointer> pointers) {
  for (const AlignedPointer& p : pointers) {
    const auto rest = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.address) %
                                           static_cast<uintptr_t>(p.alignment));
    if (rest == 0) continue;
    return absl::InvalidArgumentError(absl::StrCat(operation, ": ", p.name, " must be aligned to ",
                                                   p.alignment, " bytes, is ", rest, " bytes off"));
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
