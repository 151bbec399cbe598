// Walking an operation's tiles in parallel.
//
// Tiles are cut by shape alone, and each writes only its own outputs: results do not depend on the
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::cpu {

// Floats that one tile of an element-wise operation touches: some microseconds of work, so that a
// single token's row stays in the calling thread, where its consumer finds it in the cache.
inline constexpr int64_t kTileFloats = 16384;

inline constexpr int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

template <typename Tile>
void ForEachTile(const Stream& stream, int64_t n_tiles, const Tile& tile) {
  if (stream.pool != nullptr && n_tiles > 1) {
    stream.pool->ParallelFor(n_tiles, std::cref(tile));  // by reference: no allocation
    return;
  }
  for (int64_t i = 0; i < n_tiles; ++i) tile(i);
}

// Calls tile(first, end) for ranges of rows of `cols` floats each.
template <typename Tile>
void ForEachRowRange(const Stream& stream, int64_t rows, int64_t cols, const Tile& tile) {
  const int64_t step = std::max<int64_t>(1, kTileFloats / std::max<int64_t>(1, cols));
  ForEachTile(stream, CeilDiv(rows, step),
              [&](int64_t i) { tile(i * step, std::min(rows, (i + 1) * step)); });
}

}  // namespace walsh::kernels::cpu
