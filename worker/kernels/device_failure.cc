#include "worker/kernels/device_failure.h"

#include "absl/strings/cord.h"

namespace walsh {
namespace {

constexpr char kBrokenType[] = "walsh/device-broken";

}  // namespace

absl::Status MarkDeviceBroken(absl::Status status) {
  status.SetPayload(kBrokenType, absl::Cord("1"));
  return status;
}

bool IsDeviceBroken(const absl::Status& status) {
  return status.GetPayload(kBrokenType).has_value();
}

}  // namespace walsh
