// A device, or the host in its place (tests/testing/host_device), with what the orchestration's
// parts share.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::kernels::cuda {

class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Context>> context = Context::Create(0);
    if (!context.ok()) GTEST_SKIP() << "no GPU: " << context.status().message();
    context_ = *std::move(context);
    baseline_ = DeviceMemoryUse().bytes_now;
  }
  void TearDown() override {
    if (context_ == nullptr) return;
    EXPECT_OK(context_->Synchronize());
    EXPECT_EQ(DeviceMemoryUse().bytes_now, baseline_);
  }

  Context& context() { return *context_; }

  // A byte that depends on its whole index.
  static std::byte ByteAt(int64_t index) {
    return static_cast<std::byte>((static_cast<uint64_t>(index) * 0x9e3779b97f4a7c15u) >> 56);
  }

  std::unique_ptr<Context> context_;
  PinnedPool pinned_;
  ThreadPool pool_{3};
  int64_t baseline_ = 0;
};

}  // namespace walsh::kernels::cuda
