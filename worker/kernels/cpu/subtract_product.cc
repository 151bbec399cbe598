#include "common/status_macros.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels::cpu {
namespace {

// GPTQ's update is wide and shallow (k = 128): small tiles keep two threads busy to the end.
constexpr int64_t kTileRows = 192;
constexpr int64_t kTileCols = 384;

}  // namespace

absl::Status SubtractProduct(const SubtractProductParams& p, const Stream& stream) {
  if (p.k == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const Blas* blas, OpenBlas());
  const int64_t n_row_tiles = CeilDiv(p.m, kTileRows);
  ForEachTile(stream, n_row_tiles * CeilDiv(p.n, kTileCols), [&](int64_t tile) {
    const int64_t row = tile % n_row_tiles * kTileRows;
    const int64_t col = tile / n_row_tiles * kTileCols;
    blas->sgemm(kRowMajor, kNoTrans, kNoTrans, static_cast<int>(std::min(kTileRows, p.m - row)),
                static_cast<int>(std::min(kTileCols, p.n - col)), static_cast<int>(p.k), -1.0f,
                p.a + row * p.a_stride, static_cast<int>(p.a_stride), p.b + col,
                static_cast<int>(p.b_stride), 1.0f, p.c + row * p.c_stride + col,
                static_cast<int>(p.c_stride));
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
