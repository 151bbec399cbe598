// How PackedMatrix lies in memory.
//
//   tile    16 rows; the last one is padded with rows of scale 0
//   block   32 columns; the last one of a row is padded with code 0 against activation 0
//   step    4 columns of a tile: what one VNNI instruction multiplies, byte i of lane r being
//           column i of row r. A block has 8 steps.
//
// codes [tiles][blocks][64 · bits bytes], where a block holds
//   8 bits  8 vectors of 64 bytes: step s is vector s
//   4 bits  4 vectors: steps 2v and 2v + 1 are the low and high nibbles of vector v
//   2 bits  2 vectors: steps 4v … 4v + 3 are the bit pairs of vector v from the lowest
//   3 bits  the 2-bit vectors of the codes' low bits, then one vector whose bit s is step s's high
//           bit
// scales, zeros [tiles][groups][16]; a matrix whose zeros are all equal keeps one instead. A
// codebook has levels [tiles][groups][4][16] instead of both.
//
// One layout serves every instruction set: a 256-bit vector is the upper or lower 8 rows.
#pragma once

#include <cstdint>

#include "worker/kernels/cpu/weight_memory.h"
#include "worker/kernels/packed_matrix.h"

namespace walsh::kernels {
namespace cpu {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kCodebookLevels = 4;
inline constexpr int64_t kBlockCols = 32;
inline constexpr int64_t kStepCols = 4;
inline constexpr int64_t kBlockSteps = kBlockCols / kStepCols;
inline constexpr int64_t kVectorBytes = kTileRows * kStepCols;
static_assert(kBlockCols == kActivationBlock, "one activation scale for each block");

inline constexpr int64_t BlockBytes(int bits) { return kVectorBytes * bits; }

}  // namespace cpu

struct PackedMatrix::Storage {
  int64_t n_tiles = 0;
  int64_t n_blocks = 0;  // of a row
  int64_t n_groups = 0;  // of a row
  int64_t blocks_per_group = 0;
  cpu::WeightArray<uint8_t> codes;
  cpu::WeightArray<uint16_t> scales;       // half precision
  cpu::WeightArray<uint8_t> zeros;         // empty: float_zeros, or uniform_zero everywhere
  cpu::WeightArray<uint16_t> float_zeros;  // half precision; empty: zeros that are codes
  cpu::WeightArray<uint16_t> levels;       // half precision; empty: no codebook
  int uniform_zero = 0;
  float factor = 1.0f;  // a power of two that every scale is multiplied by

  const uint8_t* tile_codes(int64_t tile, int bits) const {
    return codes.data() + tile * n_blocks * cpu::BlockBytes(bits);
  }
  const uint16_t* tile_scales(int64_t tile) const {
    return scales.data() + tile * n_groups * cpu::kTileRows;
  }
  const uint8_t* tile_zeros(int64_t tile) const {
    return zeros.empty() ? nullptr : zeros.data() + tile * n_groups * cpu::kTileRows;
  }
  const uint16_t* tile_float_zeros(int64_t tile) const {
    return float_zeros.empty() ? nullptr : float_zeros.data() + tile * n_groups * cpu::kTileRows;
  }
  const uint16_t* tile_levels(int64_t tile) const {
    if (levels.empty()) return nullptr;
    return levels.data() + tile * n_groups * cpu::kCodebookLevels * cpu::kTileRows;
  }
};

namespace cpu {

// Code `row` (of the tile), `col` (of the block) of a packed block.
int ReadCode(const uint8_t* block, int bits, int64_t row, int64_t col);

}  // namespace cpu
}  // namespace walsh::kernels
