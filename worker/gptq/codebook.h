// The levels of a codebook: the best few values for the weights of a group.
//
// Minimises Σ importance · (w − nearest level)². On a line the clusters of the optimum are
// intervals of the sorted values, and where the last one begins grows with the values that it ends
// at, so that dynamic programming by divide and conquer finds it in O(levels · n log n): the global
// optimum, where Lloyd's iteration finds a local one. The levels are then rounded to half
// precision.
//
// Source:  Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering
//          in 1D" (arXiv 1701.07204)
// Units:   those of the weights; the scale of the importances does not matter
// Threads: safe
#pragma once

#include <cstdint>
#include <span>

#include "worker/gptq/tile.h"

namespace walsh::gptq {

// Sets grid.levels for `n` columns of weights, [n][kTileRows]; `importance` is the columns', [n]
// positive numbers. Levels are clamped into half precision's range; those of a row with a weight
// that is not finite are 0.
void FindLevels(const float* weights, int64_t n, std::span<const double> importance,
                TileGrid& grid);

}  // namespace walsh::gptq
