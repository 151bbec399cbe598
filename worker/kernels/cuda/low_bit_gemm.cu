#include <cstdint>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/alignment.h"
#include "worker/kernels/cuda/current_device.h"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/low_bit_gemm_kernel.cuh"

namespace walsh::kernels::cuda {
namespace {

#ifdef WALSH_CUDA_HAS_90A
constexpr bool kIsBuilt = true;
#else
constexpr bool kIsBuilt = false;
#endif
constexpr int kComputeMajor = 9;  // wgmma is of 9.0a alone
constexpr int kComputeMinor = 0;
constexpr int64_t kGridYMax = 65535;

absl::Status Validate(const LowBitGemmParams& p, int64_t y_cols, int64_t y_stride) {
  const ServingShape& shape = p.weights->shape();
  WALSH_RETURN_IF_ERROR(CheckTokenTiles("LowBitGemm", p.x));
  if (p.n_tokens < 0 || p.n_tokens > p.x.capacity) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitGemm: ", p.n_tokens, " tokens, the limit is ", p.x.capacity));
  }
  if (p.x.cols != shape.cols) {
    return absl::InvalidArgumentError(absl::StrCat("LowBitGemm: activations of ", p.x.cols,
                                                   " columns, the weights have ", shape.cols));
  }
  const bool has_tiles = p.y_tiles.data != nullptr;
  if ((p.y_float != nullptr) + (p.y_bf16 != nullptr) + has_tiles != 1) {
    return absl::InvalidArgumentError(
        "LowBitGemm: one of y_float, y_bf16 and y_tiles must be given");
  }
  if (p.output == LowBitOutput::kAdd && p.y_float == nullptr) {
    return absl::InvalidArgumentError("LowBitGemm: what is added to must be fp32");
  }
  if (has_tiles && !IsOfPairs(p.output)) {
    return absl::InvalidArgumentError("LowBitGemm: tiles are made of pairs of rows only");
  }
  if (has_tiles) WALSH_RETURN_IF_ERROR(CheckTokenTiles("LowBitGemm", p.y_tiles));
  if (has_tiles && (p.y_tiles.cols != y_cols || p.y_tiles.capacity < p.n_tokens)) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitGemm: output tiles of ", p.y_tiles.capacity, " tokens and ",
                     p.y_tiles.cols, " columns for ", p.n_tokens, " and ", y_cols));
  }
  if (!has_tiles && y_stride < y_cols) {
    return absl::InvalidArgumentError(absl::StrCat(
        "LowBitGemm: stride ", y_stride, " of y, must be at least its columns, ", y_cols));
  }
  if (IsOfPairs(p.output) && shape.order != ServingRows::kInterleaved) {
    return absl::InvalidArgumentError(
        "LowBitGemm: act(gate) · up takes the rows of gate and up interleaved, these are stacked");
  }
  if (shape.row_tiles() > kGridYMax * low_bit_gemm::Tile<16>::kRowTiles) {
    return absl::InvalidArgumentError(absl::StrCat("LowBitGemm: ", shape.rows,
                                                   " rows, the limit is ",
                                                   kGridYMax * low_bit_gemm::Tile<16>::kRows));
  }
  return CheckAlignment("LowBitGemm", {{"y_float", p.y_float, sizeof(float)},
                                       {"y_bf16", p.y_bf16, sizeof(__nv_bfloat16)}});
}

absl::Status Launch(const ServingShape& shape, const low_bit_gemm::LaunchPlan& plan) {
  if (shape.has_codebook) return low_bit_gemm::LaunchCodebook(plan);
  switch (shape.bits) {
    case 2:
      return low_bit_gemm::Launch2(plan);
    case 3:
      return low_bit_gemm::Launch3(plan);
    case 4:
      return low_bit_gemm::Launch4(plan);
    default:
      return low_bit_gemm::Launch8(plan);
  }
}

bool RunsOn(const CurrentDevice& device) {
  return kIsBuilt && device.compute_major == kComputeMajor && device.compute_minor == kComputeMinor;
}

}  // namespace

bool HasLowBitGemm() {
  const absl::StatusOr<CurrentDevice> device = GetCurrentDevice();
  return device.ok() && RunsOn(*device);
}

absl::Status LowBitGemm(const LowBitGemmParams& p) {
  const ServingShape& shape = p.weights->shape();
  const bool is_interleaved = shape.order == ServingRows::kInterleaved;
  const int64_t y_cols = IsOfPairs(p.output) ? shape.rows / 2 : shape.rows;
  const int64_t y_stride = p.y_stride == 0 ? y_cols : p.y_stride;
  WALSH_RETURN_IF_ERROR(Validate(p, y_cols, y_stride));
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const CurrentDevice device, GetCurrentDevice());
  if (!RunsOn(device)) {
    return absl::UnimplementedError(
        "LowBitGemm: it needs a device of compute 9.0 and a build for 90a");
  }
  constexpr int64_t kQuad = 4;
  const bool has_quads = p.y_float != nullptr && y_stride % kQuad == 0 &&
                         reinterpret_cast<uintptr_t>(p.y_float) % (kQuad * sizeof(float)) == 0;
  return Launch(
      shape, {.params = {.weights = p.weights->blocks(),
                         .n_row_tiles = static_cast<int>(shape.row_tiles()),
                         .n_blocks = static_cast<int>(shape.col_blocks()),
                         .block_bytes = static_cast<int>(shape.block_bytes()),
                         .grids = shape.grids_in_block(),
                         .tokens = p.x.data,
                         .capacity = p.x.capacity,
                         .n_tokens = static_cast<int>(p.n_tokens),
                         .n_rows = static_cast<int>(is_interleaved ? shape.rows / 2 : shape.rows),
                         .is_interleaved = is_interleaved,
                         .output = p.output,
                         .bias = p.bias,
                         .y_float = p.y_float,
                         .y_bf16 = p.y_bf16,
                         .y_stride = y_stride,
                         .has_quads = has_quads,
                         .y_tiles = p.y_tiles.data,
                         .y_capacity = p.y_tiles.capacity},
              .has_fractions = shape.has_float_zeros,
              .wanted = p.tuning,
              .device = device.index,
              .overlap_previous = p.overlap_previous,
              .stream = p.stream});
}

}  // namespace walsh::kernels::cuda
