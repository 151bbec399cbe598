#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/current_device.h"
#include "worker/kernels/cuda/low_bit_kernel.cuh"
#include "worker/kernels/cuda/low_bit_matmul.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kComputeMin = 9;  // programmatic dependent launch
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kStrideMultiple = 8;  // kVectorBytes of bf16

// Eight lanes make the record of a block of a token.
constexpr int kQuantizeThreads = 128;
constexpr int kQuantizeRecords = kQuantizeThreads / low_bit::kRecordLanes;
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeActivationsKernel(const low_bit::Activations x, int n_tokens, int n_blocks, int grids,
                              int code_shift, uint8_t* records, float* square_sums) {
  LetNextKernelStart();
  const int lane = static_cast<int>(threadIdx.x) % low_bit::kRecordLanes;
  const int i = static_cast<int>(blockIdx.x) * kQuantizeRecords +
                static_cast<int>(threadIdx.x) / low_bit::kRecordLanes;
  const bool is_there = i < n_tokens * n_blocks;
  const int block = i / n_tokens;
  const int token = i - block * n_tokens;
  WaitForPreviousKernel();
  low_bit::ActivationPiece<low_bit::kRecordLanes> piece{};
  low_bit::ActivationPiece<low_bit::kRecordLanes> weight{};
  if (is_there) low_bit::LoadAnyPiece(x, token, block, lane, piece, weight);
  if (x.has_norm) {
    const float sum = low_bit::SumOfSquares(piece);
    if (is_there && lane == 0) square_sums[i] = sum;
    if (x.norm_weight != nullptr) low_bit::Multiply(piece, weight);
  }
  if (x.rotation_block != 0) low_bit::RotatePiece(piece, lane, x.rotation_block);
  low_bit::WriteRecord(piece, lane, grids, code_shift, is_there,
                       records + static_cast<int64_t>(i) * low_bit::RecordBytes(grids));
}

struct Workspace {
  uint8_t* records = nullptr;
  float* square_sums = nullptr;
};
absl::Status Quantize(const low_bit::LaunchPlan& plan, const Workspace& workspace, int bits) {
  const low_bit::KernelParams& p = plan.params;
  const auto ctas =
      static_cast<unsigned>((p.n_tokens * p.n_blocks + kQuantizeRecords - 1) / kQuantizeRecords);
  return LaunchKernel("LowBitMatmul's activations", QuantizeActivationsKernel,
                      {.grid = dim3(ctas),
                       .threads = kQuantizeThreads,
                       .overlap_previous = plan.overlap_previous,
                       .stream = plan.stream},
                      p.x, p.n_tokens, p.n_blocks, plan.grids_in_block, low_bit::CodeShift(bits),
                      workspace.records, workspace.square_sums);
}

// Of records and sums of squares, the records of the widest kind.
constexpr int64_t kRecordBytesMax = low_bit::RecordBytes(4);
constexpr int64_t WorkspaceBytes(int64_t n_tokens, int64_t n_blocks) {
  return n_tokens * n_blocks * (kRecordBytesMax + static_cast<int64_t>(sizeof(float)));
}

// Of a warp at a time: more of them share the activations, fewer leave work for all
// multiprocessors. As measured on an H200 (docs/results/2026-11-28-h200-low-bit.md).
int DefaultRowTiles(const ServingShape& shape, int token_tiles, int64_t n_tokens, int n_ctas) {
  const int64_t row_tiles = shape.row_tiles();
  if (token_tiles == 1) {
    return row_tiles >= 5 * n_ctas && (n_tokens == 1 || row_tiles < 8 * n_ctas) ? 4 : 2;
  }
  const int64_t chunk = token_tiles * low_bit::kTileTokens;
  const int64_t chunks = (n_tokens + chunk - 1) / chunk;
  return row_tiles / 4 * chunks * 8 >= n_ctas * 7 ? 4 : 2;
}

absl::Status CheckAligned(const char* name, const void* address, int64_t stride) {
  const uintptr_t rest = reinterpret_cast<uintptr_t>(address) % kVectorBytes;
  if (rest == 0 && stride % kStrideMultiple == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "LowBitMatmul: ", name, " must be aligned to ", kVectorBytes, " bytes, is ", rest,
      " bytes off; its stride ", stride, " must be a multiple of ", kStrideMultiple));
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
  if ((p.x == nullptr) == (p.x_float == nullptr)) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: one of x and x_float must be given, ",
                     p.x == nullptr ? "both are null" : "both are"));
  }
  const void* const x = p.x != nullptr ? static_cast<const void*>(p.x) : p.x_float;
  WALSH_RETURN_IF_ERROR(CheckAligned("x", x, x_stride));
  WALSH_RETURN_IF_ERROR(CheckAligned("norm_weight", p.norm_weight, 0));
  if (p.norm_weight != nullptr && !p.has_norm) {
    return absl::InvalidArgumentError("LowBitMatmul: norm_weight is given without has_norm");
  }
  WALSH_RETURN_IF_ERROR(CheckAligned("input_order", p.input_order, 0));
  const int64_t rotation = p.rotation_block;
  if (rotation != 0 && !(IsLowBitRotation(rotation) && shape.cols % rotation == 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: a rotation in blocks of ", rotation, " of ", shape.cols,
                     " columns, must divide them and be 16, 32, 64 or 128"));
  }
  if (p.has_norm && !(p.eps >= 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("LowBitMatmul: eps ", p.eps, " of RMSNorm, must be at least 0"));
  }
  if (p.workspace != nullptr) {
    WALSH_RETURN_IF_ERROR(CheckAligned("workspace", p.workspace, 0));
    const int64_t n = LowBitWorkspaceBytes(p.n_tokens, shape.cols);
    if (p.workspace_bytes < n) {
      return absl::InvalidArgumentError(absl::StrCat("LowBitMatmul: a workspace of ",
                                                     p.workspace_bytes, " bytes, ", p.n_tokens,
                                                     " tokens need ", n));
    }
  }
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
  if (IsOfPairs(p.output) && shape.order != ServingRows::kInterleaved) {
    return absl::InvalidArgumentError(
        "LowBitMatmul: act(gate) · up takes the rows of gate and up interleaved, these are "
        "stacked");
  }
  const LowBitTuning& t = p.tuning;
  const int tiles = t.row_tiles;
  if ((tiles != 0 && tiles != 2 && tiles != 4) || t.ctas_per_sm < 0) {
    return absl::InvalidArgumentError(absl::StrCat("LowBitMatmul: tuning of ", tiles,
                                                   " row tiles (2 or 4) and ", t.ctas_per_sm,
                                                   " CTAs a multiprocessor"));
  }
  return absl::OkStatus();
}

absl::Status Launch(const ServingShape& shape, const low_bit::LaunchPlan& plan) {
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

}  // namespace

int64_t LowBitWorkspaceBytes(int64_t n_tokens, int64_t cols) {
  return WorkspaceBytes(n_tokens, (cols + kServingBlockCols - 1) / kServingBlockCols);
}

absl::Status LowBitMatmul(const LowBitMatmulParams& p) {
  const ServingShape& shape = p.weights->shape();
  const bool is_interleaved = shape.order == ServingRows::kInterleaved;
  const int64_t x_stride = p.x_stride == 0 ? shape.cols : p.x_stride;
  const int64_t y_cols = IsOfPairs(p.output) ? shape.rows / 2 : shape.rows;
  const int64_t y_stride = p.y_stride == 0 ? y_cols : p.y_stride;
  WALSH_RETURN_IF_ERROR(Validate(p, x_stride, y_cols, y_stride));
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const CurrentDevice device, GetCurrentDevice());
  if (device.compute_major < kComputeMin) {
    return absl::UnimplementedError(absl::StrCat("LowBitMatmul on a device of compute ",
                                                 device.compute_major, ".x, it needs at least ",
                                                 kComputeMin, ".0"));
  }
  const auto n_tokens = static_cast<int>(p.n_tokens);
  const auto n_blocks = static_cast<int>(shape.col_blocks());
  // Of a token, where a CTA holds all its records.
  const int64_t held_bytes = n_blocks * kRecordBytesMax;
  if (held_bytes > low_bit::kRecordsMax && p.workspace == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "LowBitMatmul: ", shape.cols, " columns need a workspace, the limit without is ",
        low_bit::kRecordsMax / kRecordBytesMax * kServingBlockCols));
  }
  const bool is_alone = p.workspace == nullptr || (n_tokens <= kLowBitTokensAlone &&
                                                   n_tokens * held_bytes <= low_bit::kRecordsMax);
  const int token_tiles = is_alone ? 1 : n_tokens <= 8 ? 2 : 4;
  low_bit::LaunchPlan plan{
      .params = {.weights = p.weights->blocks(),
                 .n_row_tiles = static_cast<int>(shape.row_tiles()),
                 .n_blocks = n_blocks,
                 .n_tokens = n_tokens,
                 .chunk_tokens = token_tiles * low_bit::kTileTokens,
                 .n_rows = static_cast<int>(is_interleaved ? shape.rows / 2 : shape.rows),
                 .is_interleaved = is_interleaved,
                 .output = p.output,
                 .x = {.x_bf16 = p.x,
                       .x_float = p.x_float,
                       .stride = x_stride,
                       .cols = static_cast<int>(shape.cols),
                       .norm_weight = p.norm_weight,
                       .has_norm = p.has_norm,
                       .order = p.input_order,
                       .rotation_block = static_cast<int>(p.rotation_block)},
                 .inverse_cols = 1.0f / static_cast<float>(shape.cols),
                 .eps = p.eps,
                 .bias = p.bias,
                 .y_float = p.y_float,
                 .y_bf16 = p.y_bf16,
                 .y_stride = y_stride},
      .grids_in_block = shape.grids_in_block(),
      .token_tiles = token_tiles,
      .row_tiles = p.tuning.row_tiles > 0
                       ? p.tuning.row_tiles
                       : DefaultRowTiles(shape, token_tiles, n_tokens, device.n_multiprocessors),
      .n_multiprocessors = device.n_multiprocessors,
      .ctas_per_sm = p.tuning.ctas_per_sm > 0 ? p.tuning.ctas_per_sm : 1,
      .overlap_previous = p.overlap_previous,
      .shared_part = p.shared_part,
      .stream = p.stream};
  if (is_alone) {
    plan.params.chunk_tokens =
        static_cast<int>(std::min<int64_t>(kLowBitTokensAlone, low_bit::kRecordsMax / held_bytes));
    return Launch(shape, plan);
  }
  const Workspace workspace{.records = static_cast<uint8_t*>(p.workspace),
                            .square_sums = reinterpret_cast<float*>(
                                static_cast<uint8_t*>(p.workspace) + n_tokens * held_bytes)};
  WALSH_RETURN_IF_ERROR(Quantize(plan, workspace, shape.bits));
  plan.params.records = workspace.records;
  plan.params.square_sums = workspace.square_sums;
  // The launch before is always the one above, which writes no weights.
  plan.overlap_previous = true;
  return Launch(shape, plan);
}

}  // namespace walsh::kernels::cuda
