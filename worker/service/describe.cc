#include "worker/service/describe.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/version.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/thread_pool.h"
#include "worker/service/host_memory.h"

namespace walsh::service {

std::string DescribeMachine() {
  const HostMemory memory = ReadHostMemory();
  const nlohmann::json description = {
      {"version", std::string(Version())},
      {"revision", std::string(Revision())},
      {"cpu",
       {{"backend", kernels::DescribeCpuBackend()}, {"threads", ThreadPool::HardwareThreads()}}},
      {"memory", {{"total_bytes", memory.total_bytes}, {"free_bytes", memory.free_bytes}}},
      {"cuda",
       {{"available", false},
        {"reason", HasCuda() ? "this build has no CUDA quantization or serving yet"
                             : "built without CUDA (WALSH_CUDA=OFF or no compiler found)"}}}};
  return description.dump(2);
}

std::string DescribeDevice(int n_threads) {
  return absl::StrCat("cpu (", kernels::DescribeCpuBackend(), ", ", n_threads, " threads)");
}

}  // namespace walsh::service
