// Shared by the GPU tests: a context or a skip with the reason, and vectors that travel.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"

namespace walsh::kernels::cuda {

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Context>> context = Context::Create(0);
    if (!context.ok()) GTEST_SKIP() << "no GPU: " << context.status().message();
    context_ = *std::move(context);
  }

  Context& context() { return *context_; }

  // Every byte 0xff: NaN as a float, bf16 or double, and no valid code.
  template <typename T>
  DeviceBuffer<T> Poisoned(int64_t n) {
    DeviceBuffer<T> buffer = *DeviceBuffer<T>::Allocate(n, context_->stream());
    EXPECT_EQ(cudaMemsetAsync(buffer.data(), 0xff, static_cast<size_t>(buffer.size_bytes()),
                              context_->stream()),
              cudaSuccess);
    EXPECT_OK(context_->Synchronize());  // some operations run on the other stream
    return buffer;
  }
  template <typename T>
  DeviceBuffer<T> Upload(const std::vector<T>& host) {
    DeviceBuffer<T> buffer =
        *DeviceBuffer<T>::Allocate(static_cast<int64_t>(host.size()), context_->stream());
    EXPECT_EQ(cudaMemcpyAsync(buffer.data(), host.data(), host.size() * sizeof(T),
                              cudaMemcpyHostToDevice, context_->stream()),
              cudaSuccess);
    EXPECT_OK(context_->Synchronize());
    return buffer;
  }
  template <typename T>
  std::vector<T> Download(const DeviceBuffer<T>& buffer) {
    std::vector<T> host(static_cast<size_t>(buffer.size()));
    EXPECT_OK(context_->Synchronize());
    EXPECT_EQ(
        cudaMemcpy(host.data(), buffer.data(), host.size() * sizeof(T), cudaMemcpyDeviceToHost),
        cudaSuccess);
    return host;
  }

 private:
  std::unique_ptr<Context> context_;
};

inline std::vector<float> RandomNormal(int64_t n, uint32_t seed, float sigma = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(generator);
  return values;
}

// ‖a − b‖² / ‖b‖² in double; NaN anywhere gives NaN, which no limit admits.
template <typename A, typename B>
double NormalizedSquaredError(const std::vector<A>& a, const std::vector<B>& b) {
  EXPECT_EQ(a.size(), b.size());
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double delta = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += delta * delta;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return norm == 0.0 ? error : error / norm;
}

}  // namespace walsh::kernels::cuda
