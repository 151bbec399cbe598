#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/alignment.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/fixed_point.cuh"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/transform_activations.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPieces = kThreads / low_bit::kRecordLanes;  // of 128 columns
constexpr int64_t kColsMultiple = 8;

__device__ __forceinline__ uint32_t Bf16Pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Eight lanes hold 128 columns of a token, as in a record of LowBitMatmul.
__global__ void __launch_bounds__(kThreads)
    TransformActivationsKernel(const low_bit::Activations x, int64_t n_pieces, int n_blocks,
                               __nv_bfloat16* y) {
  const int lane = static_cast<int>(threadIdx.x) % low_bit::kRecordLanes;
  const int64_t i =
      static_cast<int64_t>(blockIdx.x) * kPieces + threadIdx.x / low_bit::kRecordLanes;
  const int64_t token = i / n_blocks;
  const int block = static_cast<int>(i - token * n_blocks);
  low_bit::ActivationPiece<low_bit::kRecordLanes> piece{};
  low_bit::ActivationPiece<low_bit::kRecordLanes> weight{};
  if (i < n_pieces) low_bit::LoadAnyPiece(x, token, block, lane, piece, weight);
  if (x.rotation_block != 0) low_bit::RotatePiece(piece, lane, x.rotation_block);
  if (i >= n_pieces) return;
#pragma unroll
  for (int m = 0; m < low_bit::kPieceQuads<low_bit::kRecordLanes>; ++m) {
    const int col =
        block * kServingBlockCols + low_bit::PieceColumn<low_bit::kRecordLanes>(lane, m);
    if (col >= x.cols) continue;
    const float4 v = piece.x[m];
    *reinterpret_cast<uint2*>(y + token * x.stride + col) = {Bf16Pair(v.x, v.y),
                                                             Bf16Pair(v.z, v.w)};
  }
}

absl::Status Validate(const TransformActivationsParams& p) {
  if (p.n_tokens < 0 || p.cols <= 0 || p.cols % kColsMultiple != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("TransformActivations: ", p.n_tokens, " tokens of ", p.cols,
                     " columns; columns must be a positive multiple of ", kColsMultiple));
  }
  if (p.rotation_block != 0 &&
      !(IsLowBitRotation(p.rotation_block) && p.cols % p.rotation_block == 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("TransformActivations: a rotation in blocks of ", p.rotation_block, " of ",
                     p.cols, " columns, must divide them and be 16, 32, 64 or 128"));
  }
  if (p.input_order != nullptr && p.x == p.y) {
    return absl::InvalidArgumentError(
        "TransformActivations: columns in another order are not made in place");
  }
  return CheckAlignment("TransformActivations",
                        {{"x", p.x}, {"y", p.y}, {"input_order", p.input_order}});
}

}  // namespace

absl::Status TransformActivations(const TransformActivationsParams& p) {
  WALSH_RETURN_IF_ERROR(Validate(p));
  if (p.n_tokens == 0) return absl::OkStatus();
  const int64_t n_blocks = (p.cols + kServingBlockCols - 1) / kServingBlockCols;
  const int64_t n_pieces = p.n_tokens * n_blocks;
  TransformActivationsKernel<<<static_cast<unsigned>((n_pieces + kPieces - 1) / kPieces), kThreads,
                               0, p.stream>>>(
      {.x_bf16 = p.x,
       .stride = p.cols,
       .cols = static_cast<int>(p.cols),
       .order = p.input_order,
       .rotation_block = static_cast<int>(p.rotation_block)},
      n_pieces, static_cast<int>(n_blocks), p.y);
  return LaunchStatus("TransformActivations", p.stream);
}

}  // namespace walsh::kernels::cuda
