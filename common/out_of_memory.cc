#include "common/out_of_memory.h"

#include <string>

#include "absl/strings/cord.h"

namespace walsh {
namespace {

constexpr char kOutOfMemoryType[] = "walsh/out-of-memory";

}  // namespace

absl::Status OutOfMemoryError(std::string_view message) {
  absl::Status status = absl::ResourceExhaustedError(std::string(message));
  status.SetPayload(kOutOfMemoryType, absl::Cord("1"));
  return status;
}

bool IsOutOfMemory(const absl::Status& status) {
  return status.GetPayload(kOutOfMemoryType).has_value();
}

}  // namespace walsh
