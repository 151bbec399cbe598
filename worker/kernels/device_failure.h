// Device errors after which no call of this process can succeed any more.
//
// CUDA calls such errors sticky (a fault inside a kernel, for one): the process must report what it
// has, drain and exit, so that a new one begins with a sound device.
#pragma once

#include "absl/status/status.h"

namespace walsh {

absl::Status MarkDeviceBroken(absl::Status status);
bool IsDeviceBroken(const absl::Status& status);

}  // namespace walsh
