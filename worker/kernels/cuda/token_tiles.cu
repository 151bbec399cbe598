#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/alignment.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/fixed_point.cuh"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/reduce.cuh"
#include "worker/kernels/cuda/token_tiles.cuh"
#include "worker/kernels/cuda/token_tiles.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = kThreads / low_bit::kRecordLanes;  // blocks of 128 columns at once
constexpr int64_t kCapacityMultiple = 8;
constexpr int64_t kColsMultiple = 8;
constexpr int64_t kColsMax = std::numeric_limits<int32_t>::max() - kServingBlockCols;
constexpr int64_t kTilesAlignment = 128;

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A CTA has a token; eight lanes a block of 128 columns, as in a record of LowBitMatmul.
__global__ void __launch_bounds__(kThreads)
    MakeTokenTilesKernel(const low_bit::Activations x, float eps, int n_blocks, int64_t capacity,
                         __nv_bfloat16* tiles) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % low_bit::kRecordLanes;
  const int first = static_cast<int>(threadIdx.x) / low_bit::kRecordLanes;
  const int64_t token = blockIdx.x;
  WaitForPreviousKernel();
  LetNextKernelStart();
  low_bit::ActivationPiece<low_bit::kRecordLanes> piece{};
  low_bit::ActivationPiece<low_bit::kRecordLanes> weight{};
  float factor = 1;
  if (x.has_norm) {
    float sum = 0;
    // All lanes of a warp add up a block's squares.
    for (int block = first; block - first < n_blocks; block += kPieces) {
      piece = {};
      if (block < n_blocks) low_bit::LoadAnyPiece(x, token, block, lane, piece, weight);
      const float squares = low_bit::SumOfSquares(piece);
      if (lane == 0) sum += squares;
    }
    factor = rsqrtf(BlockReduce<Sum>(sum, scratch) / static_cast<float>(x.cols) + eps);
  }
  for (int block = first; block - first < n_blocks; block += kPieces) {
    const bool is_there = block < n_blocks;
    piece = {};
    if (is_there) low_bit::LoadAnyPiece(x, token, block, lane, piece, weight);
    if (x.norm_weight != nullptr) low_bit::Multiply(piece, weight);
    if (x.rotation_block != 0) low_bit::RotatePiece(piece, lane, x.rotation_block);
    if (!is_there) continue;
#pragma unroll
    for (int m = 0; m < low_bit::kPieceQuads<low_bit::kRecordLanes>; ++m) {
      const float4 v = piece.x[m];
      StoreFour(
          tiles, capacity, token,
          int64_t{block} * kServingBlockCols + low_bit::PieceColumn<low_bit::kRecordLanes>(lane, m),
          make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor));
    }
  }
}

absl::Status Validate(const MakeTokenTilesParams& p) {
  WALSH_RETURN_IF_ERROR(CheckTokenTiles("MakeTokenTiles", p.tiles));
  const int64_t cols = p.tiles.cols;
  if (p.n_tokens < 0 || p.n_tokens > p.tiles.capacity) {
    return absl::InvalidArgumentError(absl::StrCat("MakeTokenTiles: ", p.n_tokens,
                                                   " tokens, the limit is the tiles' capacity, ",
                                                   p.tiles.capacity));
  }
  if ((p.x == nullptr) == (p.x_float == nullptr)) {
    return absl::InvalidArgumentError("MakeTokenTiles: one of x and x_float must be given");
  }
  if (p.norm_weight != nullptr && !p.has_norm) {
    return absl::InvalidArgumentError("MakeTokenTiles: norm_weight is given without has_norm");
  }
  if (p.has_norm && !(p.eps >= 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("MakeTokenTiles: eps ", p.eps, " of RMSNorm, must be at least 0"));
  }
  if (p.rotation_block != 0 &&
      !(IsLowBitRotation(p.rotation_block) && cols % p.rotation_block == 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("MakeTokenTiles: a rotation in blocks of ", p.rotation_block, " of ", cols,
                     " columns, must divide them and be 16, 32, 64 or 128"));
  }
  return CheckAlignment("MakeTokenTiles", {{"x", p.x},
                                           {"x_float", p.x_float},
                                           {"norm_weight", p.norm_weight},
                                           {"input_order", p.input_order}});
}

}  // namespace

absl::Status CheckTokenTiles(const char* operation, const TokenTiles& tiles) {
  if (tiles.data == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(operation, ": token tiles without data"));
  }
  if (tiles.capacity <= 0 || tiles.capacity % kCapacityMultiple != 0 ||
      tiles.capacity > kTokenTilesCapacityMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        operation, ": token tiles of a capacity of ", tiles.capacity, ", must be a multiple of ",
        kCapacityMultiple, " up to ", kTokenTilesCapacityMax));
  }
  if (tiles.cols <= 0 || tiles.cols % kColsMultiple != 0 || tiles.cols > kColsMax) {
    return absl::InvalidArgumentError(absl::StrCat(operation, ": token tiles of ", tiles.cols,
                                                   " columns, must be a multiple of ",
                                                   kColsMultiple, " up to ", kColsMax));
  }
  return CheckAlignment(operation, {{"token tiles", tiles.data, kTilesAlignment}});
}

int64_t TokenTilesCapacity(int64_t n_tokens) { return RoundUp(n_tokens, kCapacityMultiple); }
int64_t TokenTilesSize(int64_t capacity, int64_t cols) {
  return capacity * RoundUp(cols, kServingBlockCols);
}

absl::Status MakeTokenTiles(const MakeTokenTilesParams& p) {
  WALSH_RETURN_IF_ERROR(Validate(p));
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(PrepareOnce<MakeTokenTilesKernel>());
  return LaunchKernel("MakeTokenTiles", MakeTokenTilesKernel,
                      {.grid = dim3(static_cast<unsigned>(p.n_tokens)),
                       .threads = kThreads,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      {.x_bf16 = p.x,
                       .x_float = p.x_float,
                       .stride = p.tiles.cols,
                       .cols = static_cast<int>(p.tiles.cols),
                       .norm_weight = p.norm_weight,
                       .has_norm = p.has_norm,
                       .order = p.input_order,
                       .rotation_block = static_cast<int>(p.rotation_block)},
                      p.eps,
                      static_cast<int>((p.tiles.cols + kServingBlockCols - 1) / kServingBlockCols),
                      p.tiles.capacity, p.tiles.data);
}

}  // namespace walsh::kernels::cuda
