// H += Xᵀ X over the lower triangle's tiles, each then copied to its mirror image; and C += Xᵀ Y.
//
// Bound: arithmetic, dim² · n_tokens operations (half of a full product); twice that for C.
#include "common/status_macros.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels::cpu {
namespace {

constexpr int64_t kTile = 192;

struct TileOrigin {
  int64_t row = 0;
  int64_t col = 0;
};

// Tile `index` of the lower triangle, row by row: (0,0), (1,0), (1,1), (2,0), …
TileOrigin LowerTile(int64_t index) {
  int64_t row = 0;
  while (index > row) index -= ++row;
  return {row * kTile, index * kTile};
}

}  // namespace

absl::Status Gram(const GramParams& p, const Stream& stream) {
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const Blas* blas, OpenBlas());
  const int64_t n = CeilDiv(p.dim, kTile);
  ForEachTile(stream, n * (n + 1) / 2, [&](int64_t tile) {
    const auto [row, col] = LowerTile(tile);
    const int64_t n_rows = std::min(kTile, p.dim - row);
    const int64_t n_cols = std::min(kTile, p.dim - col);
    float* h = p.h + row * p.dim + col;
    const auto tokens = static_cast<int>(p.n_tokens);
    const auto x_stride = static_cast<int>(p.x_stride);
    const auto dim = static_cast<int>(p.dim);
    if (row == col) {
      blas->ssyrk(kRowMajor, kLower, kTrans, static_cast<int>(n_rows), tokens, 1.0f, p.x + row,
                  x_stride, 1.0f, h, dim);
    } else {
      blas->sgemm(kRowMajor, kTrans, kNoTrans, static_cast<int>(n_rows), static_cast<int>(n_cols),
                  tokens, 1.0f, p.x + row, x_stride, p.x + col, x_stride, 1.0f, h, dim);
    }
    for (int64_t i = 0; i < n_rows; ++i) {
      const int64_t end = row == col ? i : n_cols;
      for (int64_t j = 0; j < end; ++j) p.h[(col + j) * p.dim + row + i] = h[i * p.dim + j];
    }
  });
  return absl::OkStatus();
}

absl::Status CrossGram(const CrossGramParams& p, const Stream& stream) {
  if (p.n_tokens == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const Blas* blas, OpenBlas());
  const int64_t n = CeilDiv(p.dim, kTile);
  ForEachTile(stream, n * n, [&](int64_t tile) {
    const int64_t row = tile / n * kTile, col = tile % n * kTile;
    blas->sgemm(kRowMajor, kTrans, kNoTrans, static_cast<int>(std::min(kTile, p.dim - row)),
                static_cast<int>(std::min(kTile, p.dim - col)), static_cast<int>(p.n_tokens), 1.0f,
                p.x + row, static_cast<int>(p.x_stride), p.y + col, static_cast<int>(p.y_stride),
                1.0f, p.c + row * p.dim + col, static_cast<int>(p.dim));
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
