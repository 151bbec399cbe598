// Memory that this process may use: the machine's, or its cgroup's limit where that is lower.
#pragma once

#include <cstdint>

namespace walsh::service {

struct HostMemory {
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;  // what could be allocated without swapping
};
// Zeros where the system does not tell.
HostMemory ReadHostMemory();

}  // namespace walsh::service
