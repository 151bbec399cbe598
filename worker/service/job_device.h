// The device that a worker's jobs run on and that serves its models, chosen once at its start.
//
// Errors: those of pipeline::MakeCudaBackend, where --device names a CUDA device
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device_choice.h"
#include "worker/engine/cuda/cuda_model.h"
#include "worker/kernels/cuda/device.h"
#include "worker/pipeline/backend.h"

namespace walsh::service {

// The CUDA devices of the machine, for tests to replace.
struct CudaDevices {
  std::function<absl::StatusOr<std::vector<kernels::cuda::DeviceInfo>>()> list;
  std::function<absl::StatusOr<std::unique_ptr<pipeline::Backend>>(int device)> open;
  std::function<absl::StatusOr<std::shared_ptr<engine::ServedModel>>(
      const std::string& directory, const engine::CudaModelOptions& options)>
      load;
};
CudaDevices InstalledCudaDevices();

struct JobDevice {
  std::unique_ptr<pipeline::Backend> backend;
  std::string name;                // "cpu", "cuda:0 NVIDIA H200"
  std::optional<int> cuda_device;  // its index, which models are loaded to as well
  absl::Status no_cuda;            // why `auto` took the CPU
};
absl::StatusOr<JobDevice> OpenJobDevice(const DeviceChoice& choice, const CudaDevices& cuda);

// The name of a job's result for what runs on this backend.
std::string DeviceName(const pipeline::Backend& backend, const CudaDevices& cuda);

// What a failure that has broken the device (worker/kernels/device_failure.h) is to others:
// UNAVAILABLE with reason DEVICE_BROKEN, so that the job is tried again, here after a restart or on
// another worker.
inline constexpr char kDeviceBroken[] = "DEVICE_BROKEN";
absl::Status DeviceBrokenError(std::string_view device, const absl::Status& cause);

}  // namespace walsh::service
