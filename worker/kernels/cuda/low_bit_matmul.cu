#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/low_bit_kernel.cuh"
#include "worker/kernels/cuda/low_bit_matmul.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kComputeMin = 9;  // programmatic dependent launch
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kStrideMultiple = 8;  // kVectorBytes of bf16

struct Device {
  int compute_major = 0;
  int n_multiprocessors = 0;
};
absl::StatusOr<Device> CurrentDevice() {
  int index = 0;
  Device device;
  WALSH_CUDA_RETURN_IF_ERROR(cudaGetDevice(&index));
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&device.compute_major, cudaDevAttrComputeCapabilityMajor, index));
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&device.n_multiprocessors, cudaDevAttrMultiProcessorCount, index));
  return device;
}

// 16 where 8 would leave multiprocessors of an H100 or H200 with little to do: of the shape only,
// as it orders the sums.
int DefaultWarps(const ServingShape& shape) {
  constexpr int64_t kRowTilesMany = 512;
  return shape.row_tiles() < kRowTilesMany && shape.col_blocks() > 8 ? 16 : 8;
}

// Those of a warp at a time: more of them share the activations, fewer leave work for all
// multiprocessors. As measured on an H200 (docs/results/2026-11-27-h200-low-bit.md).
int DefaultRowTiles(const ServingShape& shape, int warps, int token_tiles) {
  const int64_t row_tiles = shape.row_tiles();
  if (token_tiles > 1) return row_tiles < 1024 ? 2 : 4;
  if (row_tiles <= 264) return 1;
  return warps == 16 || row_tiles < 512 || shape.bits == 8 ? 2 : 4;
}

absl::Status CheckAligned(const char* name, const void* address, int64_t stride) {
  const uintptr_t rest = reinterpret_cast<uintptr_t>(address) % kVectorBytes;
  if (address == nullptr || rest != 0 || stride % kStrideMultiple != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: ", name, " must be aligned to ", kVectorBytes, " bytes, is ",
                     rest, " bytes off", address == nullptr ? " (null)" : "", "; its stride ",
                     stride, " must be a multiple of ", kStrideMultiple));
  }
  return absl::OkStatus();
}

absl::Status Validate(const LowBitMatmulParams& p, int64_t x_stride, int64_t y_cols,
                      int64_t y_stride) {
  const ServingShape& shape = p.weights->shape();
  if (p.n_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("LowBitMatmul: ", p.n_tokens, " tokens"));
  }
  if (p.n_tokens > kLowBitTokensMax) {
    return absl::UnimplementedError(
        absl::StrCat("LowBitMatmul of ", p.n_tokens, " tokens, the limit is ", kLowBitTokensMax));
  }
  WALSH_RETURN_IF_ERROR(CheckAligned("x", p.x, x_stride));
  if (x_stride < shape.cols || y_stride < y_cols) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: strides ", x_stride, " and ", y_stride,
                     " of x and y, must be at least their columns, ", shape.cols, " and ", y_cols));
  }
  if ((p.y_float == nullptr) == (p.y_bf16 == nullptr)) {
    return absl::InvalidArgumentError("LowBitMatmul: one of y_float and y_bf16 must be given");
  }
  if (p.output == LowBitOutput::kAdd && p.y_float == nullptr) {
    return absl::InvalidArgumentError("LowBitMatmul: what is added to must be fp32");
  }
  if (p.output == LowBitOutput::kSiluMul && shape.order != ServingRows::kInterleaved) {
    return absl::InvalidArgumentError(
        "LowBitMatmul: SiLU · up takes the rows of gate and up interleaved, these are stacked");
  }
  const LowBitTuning& t = p.tuning;
  const bool has_warps = t.warps == 0 || t.warps == 8 || t.warps == 16;
  const bool has_row_tiles = t.row_tiles >= 0 && t.row_tiles <= 4 && t.row_tiles != 3;
  if (!has_warps || !has_row_tiles || t.ctas_per_sm < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: tuning of ", t.warps, " warps (8 or 16), ", t.row_tiles,
                     " row tiles (1, 2 or 4) and ", t.ctas_per_sm, " CTAs a multiprocessor"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LowBitMatmul(const LowBitMatmulParams& p) {
  const ServingShape& shape = p.weights->shape();
  const bool is_silu = p.output == LowBitOutput::kSiluMul;
  const bool is_interleaved = shape.order == ServingRows::kInterleaved;
  const int64_t x_stride = p.x_stride == 0 ? shape.cols : p.x_stride;
  const int64_t y_cols = is_silu ? shape.rows / 2 : shape.rows;
  const int64_t y_stride = p.y_stride == 0 ? y_cols : p.y_stride;
  WALSH_RETURN_IF_ERROR(Validate(p, x_stride, y_cols, y_stride));
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const Device device, CurrentDevice());
  if (device.compute_major < kComputeMin) {
    return absl::UnimplementedError(absl::StrCat("LowBitMatmul on a device of compute ",
                                                 device.compute_major, ".x, it needs at least ",
                                                 kComputeMin, ".0"));
  }
  const int token_tiles = p.n_tokens <= 8 ? 1 : p.n_tokens <= 16 ? 2 : 4;
  const int warps = p.tuning.warps > 0 ? p.tuning.warps : DefaultWarps(shape);
  const int row_tiles =
      p.tuning.row_tiles > 0 ? p.tuning.row_tiles : DefaultRowTiles(shape, warps, token_tiles);
  const int ctas_per_sm = p.tuning.ctas_per_sm > 0 ? p.tuning.ctas_per_sm
                          : token_tiles > 1        ? 1
                          : warps == 16            ? 2
                                                   : 3;
  const low_bit::LaunchPlan plan{
      .params = {.codes = p.weights->codes(),
                 .grids = p.weights->grids(),
                 .n_row_tiles = static_cast<int>(shape.row_tiles()),
                 .n_blocks = static_cast<int>(shape.col_blocks()),
                 .n_grids = static_cast<int>(shape.grids()),
                 .blocks_of_grid = static_cast<int>(shape.blocks_of_grid()),
                 .n_row_groups = 0,
                 .x = p.x,
                 .x_stride = x_stride,
                 .cols = static_cast<int>(shape.cols),
                 .n_tokens = static_cast<int>(p.n_tokens),
                 .n_rows = static_cast<int>(is_interleaved ? shape.rows / 2 : shape.rows),
                 .is_interleaved = is_interleaved,
                 .output = p.output,
                 .bias = p.bias,
                 .y_float = p.y_float,
                 .y_bf16 = p.y_bf16,
                 .y_stride = y_stride},
      .grids_in_block = shape.grids_in_block(),
      .token_tiles = token_tiles,
      .row_tiles = row_tiles,
      .warps = warps,
      .ctas_max = ctas_per_sm * device.n_multiprocessors,
      .overlap_previous = p.overlap_previous,
      .stream = p.stream};
  if (shape.has_codebook) return low_bit::LaunchCodebook(plan);
  switch (shape.bits) {
    case 2:
      return low_bit::Launch2(plan);
    case 3:
      return low_bit::Launch3(plan);
    case 4:
      return low_bit::Launch4(plan);
    default:
      return low_bit::Launch8(plan);
  }
}

}  // namespace walsh::kernels::cuda
