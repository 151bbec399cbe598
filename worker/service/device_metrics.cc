#include "worker/service/device_metrics.h"

#include "common/metrics.h"

namespace walsh::service {

void ObserveDeviceMemory(const std::string& device, const pipeline::DeviceMemory& memory) {
  if (memory.total_bytes == 0) return;
  static auto& family = metrics::Gauge("walsh_worker_gpu_memory_bytes",
                                       "Memory of the worker's GPU, by kind: total and free.");
  const auto set = [&](const char* kind, int64_t bytes) {
    family.Add({{"device", device}, {"kind", kind}}).Set(static_cast<double>(bytes));
  };
  set("total", memory.total_bytes);
  set("free", memory.free_bytes);
}

}  // namespace walsh::service
