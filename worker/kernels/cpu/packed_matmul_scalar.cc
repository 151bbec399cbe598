#include "worker/kernels/cpu/packed_matmul.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cpu {
namespace {

float ZeroAt(const PackedTile& tile, int64_t at) {
  if (tile.float_zeros != nullptr) return HalfToFloat(tile.float_zeros[at]);
  return tile.zeros == nullptr ? tile.uniform_zero : static_cast<float>(tile.zeros[at]);
}

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
    const float zero = ZeroAt(tile, at);
    group_sum -= zero * tile.x.group_sums[token * tile.n_groups + group];
    sum += HalfToFloat(tile.scales[at]) * group_sum;
  }
  return sum * tile.factor + (tile.bias == nullptr ? 0.0f : tile.bias[row]);
}

// Of a codebook: sums of the activations whose codes have the low bit, the high bit, both.
float DotRowOfLevels(const PackedTile& tile, int bits, int64_t token, int64_t row) {
  const int8_t* x = tile.x.codes + token * tile.x.n_blocks * kBlockCols;
  const float* x_scales = tile.x.scales + token * tile.x.n_blocks;
  float sum = 0;
  int64_t block = 0;
  for (int64_t group = 0; group < tile.n_groups; ++group) {
    float low_sum = 0, high_sum = 0, both_sum = 0;
    for (int64_t i = 0; i < tile.blocks_per_group; ++i, ++block) {
      const uint8_t* codes = tile.codes + block * BlockBytes(bits);
      int32_t low = 0, high = 0, both = 0;
      for (int64_t col = 0; col < kBlockCols; ++col) {
        const int code = ReadCode(codes, bits, row, col);
        const int32_t value = x[block * kBlockCols + col];
        low += (code & 1) * value;
        high += (code >> 1) * value;
        both += (code & code >> 1) * value;
      }
      low_sum += x_scales[block] * static_cast<float>(low);
      high_sum += x_scales[block] * static_cast<float>(high);
      both_sum += x_scales[block] * static_cast<float>(both);
    }
    const auto level = [&](int64_t k) {
      return HalfToFloat(tile.levels[(group * kCodebookLevels + k) * kTileRows + row]);
    };
    const float l0 = level(0), l1 = level(1), l2 = level(2), l3 = level(3);
    sum += l0 * tile.x.group_sums[token * tile.n_groups + group] + (l1 - l0) * low_sum +
           (l2 - l0) * high_sum + (l3 - l2 - l1 + l0) * both_sum;
  }
  return sum + (tile.bias == nullptr ? 0.0f : tile.bias[row]);
}

void MultiplyLevels(const PackedTile& tile, bool expanded) {
  for (int64_t t = 0; t < tile.x.n_tokens; ++t) {
    for (int64_t row = 0; row < tile.n_rows; ++row) {
      tile.y[t * tile.y_stride + row] = DotRowOfLevels(tile, expanded ? 8 : 2, t, row);
    }
  }
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
  return {.multiply = Multiply,
          .multiply_levels = MultiplyLevels,
          .expand = Expand,
          .expand_tokens_min = 2,
          .name = "scalar"};
}

}  // namespace walsh::kernels::cpu
