#include "worker/service/host_memory.h"

#include <algorithm>
#include <fstream>
#include <string>

namespace walsh::service {
namespace {

// "MemTotal:       24689164 kB"
int64_t MemInfoBytes(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string name;
  int64_t kib = 0;
  std::string unit;
  while (file >> name >> kib) {
    std::getline(file, unit);
    if (name == key + ":") return kib << 10;
  }
  return 0;
}

// A number in a file of one; `absent` when there is none ("max", or no such file).
int64_t NumberIn(const char* path, int64_t absent) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : absent;
}

}  // namespace

HostMemory ReadHostMemory() {
  HostMemory memory{MemInfoBytes("MemTotal"), MemInfoBytes("MemAvailable")};
  // cgroup v2, as seen from inside a container.
  const int64_t limit = NumberIn("/sys/fs/cgroup/memory.max", memory.total_bytes);
  const int64_t used = NumberIn("/sys/fs/cgroup/memory.current", 0);
  if (limit < memory.total_bytes) {
    memory.total_bytes = limit;
    memory.free_bytes = std::min(memory.free_bytes, std::max<int64_t>(0, limit - used));
  }
  return memory;
}

}  // namespace walsh::service
