// Device memory of a test, and the reason to skip where there is no device.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "common/check.h"
#include "worker/kernels/cuda/device.h"

namespace walsh::testing {

// A copy of `host` in device memory.
class DeviceFloats {
 public:
  explicit DeviceFloats(const std::vector<float>& host) : n_(host.size()) {
    WALSH_CHECK_EQ(cudaMalloc(&data_, (n_ + 1) * sizeof(float)), cudaSuccess);
    WALSH_CHECK_EQ(cudaMemcpy(data_, host.data(), n_ * sizeof(float), cudaMemcpyHostToDevice),
                   cudaSuccess);
  }
  ~DeviceFloats() { cudaFree(data_); }
  DeviceFloats(const DeviceFloats&) = delete;
  DeviceFloats& operator=(const DeviceFloats&) = delete;

  float* data() { return static_cast<float*>(data_); }
  // Waits for everything before.
  std::vector<float> Read() const {
    std::vector<float> host(n_);
    WALSH_CHECK_EQ(cudaDeviceSynchronize(), cudaSuccess);
    WALSH_CHECK_EQ(cudaMemcpy(host.data(), data_, n_ * sizeof(float), cudaMemcpyDeviceToHost),
                   cudaSuccess);
    return host;
  }

 private:
  void* data_ = nullptr;
  size_t n_;
};

}  // namespace walsh::testing

#define WALSH_REQUIRE_GPU()                                                        \
  if (const auto devices = ::walsh::kernels::cuda::ListDevices(); !devices.ok()) { \
    GTEST_SKIP() << "no GPU: " << devices.status().ToString();                     \
  }
