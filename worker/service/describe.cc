#include "worker/service/describe.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/version.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/thread_pool.h"
#include "worker/service/host_memory.h"

namespace walsh::service {
namespace {

using nlohmann::json;

json DescribeCuda(const absl::Status& opened, const CudaDevices& cuda) {
  json described = {{"available", opened.ok()}};
  if (const auto devices = cuda.list(); devices.ok()) {
    json& names = described["devices"] = json::array();
    for (const kernels::cuda::DeviceInfo& device : *devices) {
      names.push_back(kernels::cuda::Describe(device));
    }
  }
  if (!opened.ok()) described["reason"] = std::string(opened.message());
  return described;
}

}  // namespace

std::string DescribeMachine(const DeviceChoice& choice, const CudaDevices& cuda) {
  // Loads OpenBLAS, which must be alone; a device's driver starts threads.
  const std::string cpu_backend = kernels::DescribeCpuBackend();
  const HostMemory memory = ReadHostMemory();
  const auto opened = cuda.open(choice.cuda_device);
  std::string jobs_on = "cpu";
  if (choice.kind != DeviceChoice::Kind::kCpu && opened.ok()) {
    jobs_on = DeviceName(**opened, cuda);
  } else if (choice.kind == DeviceChoice::Kind::kCuda) {
    jobs_on = absl::StrCat("nothing: cuda:", choice.cuda_device, " is not available");
  }
  const json description = {
      {"version", std::string(Version())},
      {"revision", std::string(Revision())},
      {"cpu", {{"backend", cpu_backend}, {"threads", ThreadPool::HardwareThreads()}}},
      {"memory", {{"total_bytes", memory.total_bytes}, {"free_bytes", memory.free_bytes}}},
      {"cuda", DescribeCuda(opened.status(), cuda)},
      {"jobs_on", jobs_on},
      {"generation_on", jobs_on}};
  return description.dump(2, ' ', false, json::error_handler_t::replace);
}

std::string DescribeDevice(const JobDevice& device, int n_threads) {
  const std::string cpu =
      absl::StrCat("cpu (", kernels::DescribeCpuBackend(), ", ", n_threads, " threads)");
  if (device.name == "cpu") return cpu;
  return absl::StrCat(device.name, ", host ", cpu);
}

}  // namespace walsh::service
