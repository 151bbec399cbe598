// A device without hardware: it needs and has what a test says and fails as the test says.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "worker/pipeline/backend.h"
#include "worker/service/job_device.h"

namespace walsh::service {

// Shared by a test and the backends that it hands out.
struct FakeDevice {
  std::string name = "cuda:0";
  absl::Status opened;
  pipeline::MemoryNeeds needs;
  absl::StatusOr<pipeline::DeviceMemory> memory =
      pipeline::DeviceMemory{.total_bytes = int64_t{80} << 30, .free_bytes = int64_t{79} << 30};
  absl::Status supported;
  std::function<absl::Status()> quantize;  // a job's outcome; must fail, as nothing is written
};

class FakeBackend final : public pipeline::Backend {
 public:
  explicit FakeBackend(FakeDevice* device) : device_(device) {}

  std::string name() const override { return device_->name; }
  pipeline::JobUse EndJob() override { return {}; }
  pipeline::MemoryNeeds Needs(const pipeline::JobSpec&, const ModelConfig&,
                              const pipeline::ResolvedJob&) const override {
    return device_->needs;
  }
  absl::StatusOr<pipeline::DeviceMemory> memory() const override { return device_->memory; }
  absl::Status CheckSupported(const ModelConfig&, const pipeline::ResolvedJob&) const override {
    return device_->supported;
  }
  absl::StatusOr<double> CheckRotation(const pipeline::JobInputs&, const calibrate::TokenWindows&,
                                       pipeline::Progress&) override {
    return 0.0;
  }
  absl::Status Quantize(const pipeline::JobInputs&, const calibrate::TokenWindows&, ArtifactWriter&,
                        pipeline::Progress&, pipeline::JobReport&) override {
    return device_->quantize();
  }
  absl::StatusOr<pipeline::Quality> Evaluate(const pipeline::JobInputs&, const ArtifactReader&,
                                             const calibrate::TokenWindows&,
                                             const evaluate::ScoredFrom&,
                                             pipeline::Progress&) override {
    return pipeline::Quality();
  }

 private:
  FakeDevice* const device_;
};

// One device of this kind; `device` outlives what is opened.
inline CudaDevices FakeCudaDevices(FakeDevice* device) {
  return {.list =
              [] {
                return std::vector<kernels::cuda::DeviceInfo>{
                    {.index = 0, .name = "NVIDIA H200", .memory_bytes = int64_t{80} << 30}};
              },
          .open = [device](int index) -> absl::StatusOr<std::unique_ptr<pipeline::Backend>> {
            if (index != 0) return absl::FailedPreconditionError("there is no such device");
            if (!device->opened.ok()) return device->opened;
            return std::make_unique<FakeBackend>(device);
          }};
}

}  // namespace walsh::service
