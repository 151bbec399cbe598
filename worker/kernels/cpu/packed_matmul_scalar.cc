#include "worker/kernels/cpu/packed_matmul.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cpu {
namespace {

float DotRow(const PackedTile& tile, int bits, int64_t token, int64_t row) {
  const int8_t* x = tile.x.codes + token * tile.x.n_blocks * kBlockCols;
  const float* x_scales = tile.x.scales + token * tile.x.n_blocks;
  float sum = 0;
  int64_t block = 0;
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    float group_sum = 0;
    for (int64_t i = 0; i < tile.blocks_per_group; ++i, ++block) {
      const uint8_t* codes = tile.codes + block * BlockBytes(bits);
      int32_t dot = 0;
      for (int64_t col = 0; col < kBlockCols; ++col) {
        dot += ReadCode(codes, bits, row, col) * x[block * kBlockCols + col];
      }
      group_sum += x_scales[block] * static_cast<float>(dot);
    }
    const int64_t at = group * kTileRows + row;
    const float zero =
        tile.zeros == nullptr ? tile.uniform_zero : static_cast<float>(tile.zeros[at]);
    group_sum -= zero * tile.x.group_sums[token * tile.n_groups + group];
    sum += HalfToFloat(tile.scales[at]) * group_sum;
  }
  return sum * tile.factor + (tile.bias == nullptr ? 0.0f : tile.bias[row]);
}

void Multiply(const PackedTile& tile, int bits, bool expanded) {
  for (int64_t t = 0; t < tile.x.n_tokens; ++t) {
    for (int64_t row = 0; row < tile.n_rows; ++row) {
      tile.y[t * tile.y_stride + row] = DotRow(tile, expanded ? 8 : bits, t, row);
    }
  }
}

void Expand(const uint8_t* codes, int bits, int64_t n_blocks, uint8_t* bytes) {
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t i = 0; i < kTileRows * kBlockCols; ++i) {
      const int64_t step = i / kVectorBytes;
      const int64_t byte = i % kVectorBytes;
      const int64_t row = byte / kStepCols;
      const int64_t col = step * kStepCols + byte % kStepCols;
      bytes[block * BlockBytes(8) + i] =
          static_cast<uint8_t>(ReadCode(codes + block * BlockBytes(bits), bits, row, col));
    }
  }
}

}  // namespace

PackedKernel ScalarPackedKernel() {
  return {.multiply = Multiply, .expand = Expand, .expand_tokens_min = 2, .name = "scalar"};
}

}  // namespace walsh::kernels::cpu
