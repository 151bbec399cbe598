#include "worker/pipeline/cuda/staged_download.h"

#include <cuda_runtime_api.h>

#include "tests/unit/worker/kernels/cuda/device_fixture.h"
#include "worker/kernels/cuda/read_ahead.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::DeviceTest;

using kernels::cuda::kPieceBytes;
namespace {

using kernels::cuda::DeviceBuffer;

using StagedDownloadTest = DeviceTest;

// Parts that end in the middle of a piece, at its end, and that take several.
TEST_F(StagedDownloadTest, EveryByteArrives) {
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{},
                                         {0, 0},
                                         {1},
                                         {5, 0, 7, 1 << 20, 3},
                                         {kPieceBytes},
                                         {kPieceBytes - 1, 2},
                                         {3, 2 * kPieceBytes + 12345, 77, kPieceBytes / 2}}) {
    std::vector<DeviceBuffer<std::byte>> on_device;
    std::vector<std::vector<std::byte>> expected, actual;
    std::vector<DownloadPart> parts;
    for (const int64_t size : sizes) {
      std::vector<std::byte> bytes(static_cast<size_t>(size));
      // A prime, so that no two pieces are alike.
      for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<std::byte>(i % 251 + on_device.size());
      }
      on_device.push_back(*DeviceBuffer<std::byte>::Allocate(size, context().stream()));
      ASSERT_EQ(cudaMemcpyAsync(on_device.back().data(), bytes.data(), bytes.size(),
                                cudaMemcpyHostToDevice, context().stream()),
                cudaSuccess);
      ASSERT_OK(context().Synchronize());
      expected.push_back(std::move(bytes));
      actual.emplace_back(static_cast<size_t>(size), std::byte{0xee});
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      parts.push_back({on_device[i].data(), actual[i].data(), sizes[i]});
    }
    ASSERT_OK(DownloadStaged(context(), pinned_, pool_, parts));
    for (size_t i = 0; i < sizes.size(); ++i) EXPECT_TRUE(actual[i] == expected[i]) << i;
  }
}

}  // namespace
}  // namespace walsh::pipeline::cuda
