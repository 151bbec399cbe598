#include "worker/service/job_device.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "worker/pipeline/cuda/cuda_backend.h"

namespace walsh::service {
namespace {

JobDevice OnCpu(absl::Status no_cuda) {
  std::unique_ptr<pipeline::Backend> backend = pipeline::MakeCpuBackend();
  std::string name = backend->name();
  return {.backend = std::move(backend), .name = std::move(name), .no_cuda = std::move(no_cuda)};
}

}  // namespace

CudaDevices InstalledCudaDevices() {
  return {.list = kernels::cuda::ListDevices,
          .open = pipeline::MakeCudaBackend,
          .load = engine::LoadCudaModel};
}

absl::StatusOr<JobDevice> OpenJobDevice(const DeviceChoice& choice, const CudaDevices& cuda) {
  if (choice.kind == DeviceChoice::Kind::kCpu) return OnCpu(absl::OkStatus());
  absl::StatusOr<std::unique_ptr<pipeline::Backend>> backend = cuda.open(choice.cuda_device);
  if (!backend.ok()) {
    if (choice.kind == DeviceChoice::Kind::kAuto) return OnCpu(backend.status());
    return absl::Status(backend.status().code(), absl::StrCat("--device cuda:", choice.cuda_device,
                                                              ": ", backend.status().message()));
  }
  std::string name = DeviceName(**backend, cuda);
  return JobDevice{
      .backend = *std::move(backend), .name = std::move(name), .cuda_device = choice.cuda_device};
}

std::string DeviceName(const pipeline::Backend& backend, const CudaDevices& cuda) {
  const std::string name = backend.name();
  const auto devices = cuda.list();
  if (!devices.ok()) return name;
  for (const kernels::cuda::DeviceInfo& device : *devices) {
    if (name == absl::StrCat("cuda:", device.index)) return absl::StrCat(name, " ", device.name);
  }
  return name;
}

absl::Status DeviceBrokenError(std::string_view device, const absl::Status& cause) {
  // Without the cause's payloads: that of a broken device is for this process only.
  absl::Status status = absl::UnavailableError(
      absl::StrCat(std::string(device), " is broken until its worker starts again: ",
                   absl::StatusCodeToString(cause.code()), ": ", cause.message()));
  SetErrorInfo(status, kDeviceBroken, {{"device", std::string(device)}});
  return status;
}

}  // namespace walsh::service
