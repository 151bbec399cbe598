// The CUDA devices of this machine.
//
// No CUDA header here, and a build without CUDA has the same functions: callers ask and get a
// status that says why there is nothing.
//
// Errors:  FAILED_PRECONDITION  built without CUDA; no driver, or one that is too old
//          NOT_FOUND            a driver, but no device that may be used
// Threads: safe
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh::kernels::cuda {

struct DeviceInfo {
  int index = 0;
  std::string name;
  int compute_major = 0;
  int compute_minor = 0;
  int n_multiprocessors = 0;
  int64_t memory_bytes = 0;
  int64_t memory_free_bytes = 0;
  int64_t l2_bytes = 0;
};

absl::StatusOr<std::vector<DeviceInfo>> ListDevices();

// "cuda:0 NVIDIA H200, compute 9.0, 132 multiprocessors, 140.4 GiB (139.8 free), L2 50.0 MiB"
std::string Describe(const DeviceInfo& device);

}  // namespace walsh::kernels::cuda
