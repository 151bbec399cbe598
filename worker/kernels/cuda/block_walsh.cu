#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/block_walsh.cuh"
#include "worker/kernels/cuda/block_walsh.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/current_device.h"
#include "worker/kernels/validate.h"

namespace walsh::kernels::cuda {
namespace {

// Eight CTAs of 256 threads fill a multiprocessor; more would only queue.
constexpr int64_t kCtasPerMultiprocessor = 8;

template <int kBlock, bool kSequency, bool kAligned>
void Launch(const BlockWalshArguments& arguments, int n_multiprocessors, cudaStream_t stream) {
  constexpr int64_t kBlocksPerCta = kWarpsPerCta * BlockWalshLayout<kBlock>::kBlocksPerWarp;
  const int64_t n_needed = (arguments.n_blocks + kBlocksPerCta - 1) / kBlocksPerCta;
  const int64_t n_ctas = std::min(n_needed, kCtasPerMultiprocessor * n_multiprocessors);
  BlockWalshKernel<kBlock, kSequency, kAligned>
      <<<static_cast<unsigned>(n_ctas), kWarpLanes * kWarpsPerCta, 0, stream>>>(arguments);
}

template <int kBlock>
void LaunchBlock(const BlockWalshParams& p, const BlockWalshArguments& arguments,
                 int n_multiprocessors, cudaStream_t stream) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && arguments.x_stride % 4 == 0;
  if (p.sequency && is_aligned) {
    Launch<kBlock, true, true>(arguments, n_multiprocessors, stream);
  } else if (p.sequency) {
    Launch<kBlock, true, false>(arguments, n_multiprocessors, stream);
  } else if (is_aligned) {
    Launch<kBlock, false, true>(arguments, n_multiprocessors, stream);
  } else {
    Launch<kBlock, false, false>(arguments, n_multiprocessors, stream);
  }
}

}  // namespace

absl::Status BlockWalsh(const BlockWalshParams& p, cudaStream_t stream) {
  WALSH_RETURN_IF_ERROR(Validate(p));
  if (p.block < kWalshBlockMin || p.block > kWalshBlockMax) {
    return absl::InvalidArgumentError(absl::StrCat("BlockWalsh: block must be from ",
                                                   kWalshBlockMin, " to ", kWalshBlockMax,
                                                   " on CUDA, is ", p.block));
  }
  if (p.rows == 0 || p.cols == 0) return absl::OkStatus();
  BlockWalshArguments arguments{.x = p.x,
                                .x_stride = p.x_stride,
                                .n_row_blocks = p.cols / p.block,
                                .n_blocks = p.rows * (p.cols / p.block)};
  if (p.x_stride == p.cols) arguments.n_row_blocks = arguments.n_blocks;
  WALSH_ASSIGN_OR_RETURN(const CurrentDevice device, GetCurrentDevice());
  const int n_multiprocessors = device.n_multiprocessors;
  switch (p.block) {
    case 16:
      LaunchBlock<16>(p, arguments, n_multiprocessors, stream);
      break;
    case 32:
      LaunchBlock<32>(p, arguments, n_multiprocessors, stream);
      break;
    case 64:
      LaunchBlock<64>(p, arguments, n_multiprocessors, stream);
      break;
    case 128:
      LaunchBlock<128>(p, arguments, n_multiprocessors, stream);
      break;
    default:
      LaunchBlock<256>(p, arguments, n_multiprocessors, stream);
  }
  return LaunchStatus("BlockWalsh", stream);
}

}  // namespace walsh::kernels::cuda
