// The two inner loops of quantization, on a tile of 32 output rows.
//
// A tile is column-major: element (row r, column c) is at [c · kTileRows + r], so that SIMD lanes
// are rows. No sum crosses lanes; results therefore do not depend on the width of the vectors (only
// on whether the instruction set fuses multiplication and addition), and the rows of a tile do not
// depend on each other. Tiles with fewer rows are padded with zeros.
//
// Source:  Frantar et al. 2023, "GPTQ" (arXiv 2210.17323), algorithm 1; the clip search is that of
//          its reference implementation (norm 2.4, grid 100, shrink to 0.2), with the scale rounded
//          to half precision before codes and error are computed.
// Threads: safe on distinct tiles
#pragma once

#include <cstdint>

namespace walsh::gptq {

inline constexpr int64_t kTileRows = 32;
// Half precision's largest value and smallest subnormal: scales are clamped into them.
inline constexpr float kScaleMax = 65504.0f;
inline constexpr float kScaleMin = 5.9604644775390625e-8f;

// A codebook's levels.
inline constexpr int kLevels = 4;

// The grid of each row's group, all exact in half precision. Uniform: w ≈ scale · (code − zero),
// codes 0 … 2^bits − 1; zeros are codes, or with GridForm::kFloatZero any number. Codebook:
// w ≈ levels[code], which ascend.
struct TileGrid {
  float scales[kTileRows];
  float zeros[kTileRows];
  float levels[kLevels][kTileRows];
};

enum class GridForm { kIntegerZero, kFloatZero, kCodebook };

struct GridOptions {
  int bits = 4;
  bool symmetric = false;  // zero = 2^(bits − 1)
  bool mse_clip = true;
  GridForm form = GridForm::kIntegerZero;  // not a codebook: worker/gptq/codebook.h
};

// The grid of `n` columns of weights, [n][kTileRows]. A row of zeros gets scale 1. An integer
// zero's range always holds 0 and shrinks towards it; a float zero's is that of the weights and
// shrinks towards its middle.
void FindGrid(const GridOptions& options, const float* weights, int64_t n, TileGrid& grid);

// Quantizes columns [first, last) of a block of `n` columns on `grid`, one after another, and moves
// each column's error to the columns after it, up to the block's end, and with `correction` the
// column's weight times that. `weights` keep what was quantized: updated, not rounded.
struct QuantizeColumnsParams {
  int bits = 4;
  int64_t n = 0;
  int64_t first = 0;
  int64_t last = 0;
  const TileGrid* grid = nullptr;
  float* weights = nullptr;  // [n][kTileRows], updated
  // Rows first … last − 1 of the upper factor U of the block, [n][u_stride]; null rounds to
  // nearest.
  const float* u = nullptr;
  int64_t u_stride = 0;
  // The same rows of HessianFactor::correction, of the same stride; null adds nothing.
  const float* correction = nullptr;
  float* codes = nullptr;   // [n][kTileRows], integers
  float* errors = nullptr;  // [n][kTileRows], (w − quantized w) / U(i, i); unused without u
  GridForm form = GridForm::kIntegerZero;
};
void QuantizeColumns(const QuantizeColumnsParams& params);

}  // namespace walsh::gptq
