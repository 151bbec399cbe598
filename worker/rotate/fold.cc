#include "worker/rotate/fold.h"

#include <algorithm>

#include "common/check.h"

namespace walsh::rotate {
namespace {

constexpr int64_t kTileRows = 64;

int64_t Tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Vectors of length rotation.width(), contiguous at `x`, each ← diag(scale) then · R.
void RotateVectors(float* x, int64_t n, std::span<const float> scale, const Rotation& rotation,
                   ThreadPool& pool) {
  const int64_t width = rotation.width();
  pool.ParallelFor(Tiles(n), [&](int64_t tile) {
    const int64_t first = tile * kTileRows;
    const int64_t count = std::min(kTileRows, n - first);
    float* rows = x + first * width;
    std::vector<double> work(rows, rows + count * width);
    if (!scale.empty()) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          work[static_cast<size_t>(i * width + j)] *= scale[static_cast<size_t>(j)];
        }
      }
    }
    rotation.ApplyRight(work.data(), count, width);
    std::transform(work.begin(), work.end(), rows, [](double v) { return static_cast<float>(v); });
  });
}

// Rᵀ · B for each block B of rotation.width() rows: its columns are vectors times R.
void RotateRowBlocks(Matrix& weights, const Rotation& rotation, ThreadPool& pool) {
  const int64_t width = rotation.width();
  WALSH_CHECK_EQ(weights.rows() % width, 0);
  const int64_t column_tiles = Tiles(weights.cols());
  pool.ParallelFor(weights.rows() / width * column_tiles, [&](int64_t tile) {
    const int64_t first_row = tile / column_tiles * width;
    const int64_t first_col = tile % column_tiles * kTileRows;
    const int64_t count = std::min(kTileRows, weights.cols() - first_col);
    std::vector<double> columns(static_cast<size_t>(count * width));
    for (int64_t i = 0; i < width; ++i) {
      const float* row = weights.row(first_row + i) + first_col;
      for (int64_t j = 0; j < count; ++j) columns[static_cast<size_t>(j * width + i)] = row[j];
    }
    rotation.ApplyRight(columns.data(), count, width);
    for (int64_t i = 0; i < width; ++i) {
      float* row = weights.row(first_row + i) + first_col;
      for (int64_t j = 0; j < count; ++j) {
        row[j] = static_cast<float>(columns[static_cast<size_t>(j * width + i)]);
      }
    }
  });
}

}  // namespace

void RotateReader(Matrix& weights, std::span<const float> norm, const Rotation& rotation,
                  ThreadPool& pool) {
  WALSH_CHECK_EQ(weights.cols(), rotation.width());
  WALSH_CHECK(norm.empty() || static_cast<int64_t>(norm.size()) == weights.cols());
  if (rotation.is_identity() && norm.empty()) return;
  RotateVectors(weights.data(), weights.rows(), norm, rotation, pool);
}

void RotateWriter(Matrix& weights, std::vector<float>& bias, const Rotation& rotation,
                  ThreadPool& pool) {
  WALSH_CHECK_EQ(weights.rows(), rotation.width());
  RotateHeadOutputs(weights, bias, rotation, pool);
}

void RotateHeadOutputs(Matrix& weights, std::vector<float>& bias, const Rotation& rotation,
                       ThreadPool& pool) {
  if (rotation.is_identity()) return;
  RotateRowBlocks(weights, rotation, pool);
  if (!bias.empty()) {
    RotateVectors(bias.data(), static_cast<int64_t>(bias.size()) / rotation.width(), {}, rotation,
                  pool);
  }
}

void RotateHeadInputs(Matrix& weights, const Rotation& rotation, ThreadPool& pool) {
  if (rotation.is_identity()) return;
  WALSH_CHECK_EQ(weights.cols() % rotation.width(), 0);
  RotateVectors(weights.data(), weights.size() / rotation.width(), {}, rotation, pool);
}

void FoldLayer(const LayerWeights& layer, const Rotation& r1, const Rotation& r2,
               ThreadPool& pool) {
  for (Matrix* reader : {&layer.q, &layer.k, &layer.v}) {
    RotateReader(*reader, layer.input_norm, r1, pool);
  }
  for (Matrix* reader : {&layer.gate, &layer.up}) {
    RotateReader(*reader, layer.post_attention_norm, r1, pool);
  }
  RotateHeadOutputs(layer.v, layer.v_bias, r2, pool);
  RotateHeadInputs(layer.o, r2, pool);
  RotateWriter(layer.o, layer.o_bias, r1, pool);
  RotateWriter(layer.down, layer.down_bias, r1, pool);
  layer.input_norm.clear();
  layer.post_attention_norm.clear();
}

}  // namespace walsh::rotate
