// Keys and values of a paged pool (worker/kernels/cuda/paged_kv.h) on the host, by the definitions:
// what kernels write and read is compared with it, and a device that is the host has it in their
// place.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/qkv_transform.h"

namespace walsh::testing {

using kernels::cuda::bf16;
using kernels::cuda::HeadTransform;
using kernels::cuda::kPoolBlockTokens;
using kernels::cuda::KvPoolLayer;
using kernels::cuda::KvPoolShape;

// A token's key or value of a kv head, where it lies in a layer of the pool.
class PooledHead {
 public:
  // `token` of a sequence, of which `block` is the one that has it.
  PooledHead(const KvPoolLayer& pool, int64_t block, int64_t token, int64_t kv_head, bool is_value)
      : shape_(pool.shape) {
    uint8_t* head = static_cast<uint8_t*>(pool.data) + block * shape_.block_bytes() +
                    (is_value ? shape_.block_bytes() / 2 : 0) + kv_head * shape_.head_bytes();
    const int64_t place = token % kPoolBlockTokens;
    values_ = head + place * shape_.form.code_bytes(shape_.head_dim);
    grids_ = head + shape_.codes_bytes() + place * shape_.form.grid_bytes(shape_.head_dim);
  }

  // Of values: exact but for the last bit of a float.
  float operator[](int64_t i) const {
    if (!shape_.form.is_quantized()) {
      return __bfloat162float(reinterpret_cast<const bf16*>(values_)[i]);
    }
    const uint32_t grid = GridOf(i);
    const int code = shape_.form.bits == 8 ? values_[i] : values_[NibbleOf(i) / 2] >> Shift(i) & 15;
    return ScaleOf(grid) * static_cast<float>(code - static_cast<int>(grid & 0xff));
  }
  // Of the group that element i belongs to.
  float scale(int64_t i) const { return ScaleOf(GridOf(i)); }
  int zero(int64_t i) const { return static_cast<int>(GridOf(i) & 0xff); }
  // All of its bytes.
  std::span<uint8_t> codes() const {
    return {values_, static_cast<size_t>(shape_.form.code_bytes(shape_.head_dim))};
  }
  std::span<uint8_t> grids() const {
    return {grids_, static_cast<size_t>(shape_.form.grid_bytes(shape_.head_dim))};
  }

  void Store(std::span<const float> x) {
    if (!shape_.form.is_quantized()) {
      std::transform(x.begin(), x.end(), reinterpret_cast<bf16*>(values_),
                     [](float value) { return __float2bfloat16(value); });
      return;
    }
    for (int64_t first = 0; first < shape_.head_dim; first += group_size()) {
      StoreGroup(first, x.subspan(static_cast<size_t>(first), static_cast<size_t>(group_size())));
    }
  }

 private:
  static float ScaleOf(uint32_t grid) { return std::bit_cast<float>(grid & ~0xffu); }
  // Of 8 neighbours the even ones come first.
  static int64_t NibbleOf(int64_t i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }
  static int Shift(int64_t i) { return static_cast<int>(NibbleOf(i) % 2) * 4; }
  uint32_t GridOf(int64_t i) const {
    uint32_t grid = 0;
    std::memcpy(&grid, grids_ + i / group_size() * 4, sizeof(grid));
    return grid;
  }
  int64_t group_size() const { return shape_.head_dim / shape_.form.n_groups(shape_.head_dim); }

  void StoreGroup(int64_t first, std::span<const float> x) {
    const double levels = std::ldexp(1.0, shape_.form.bits) - 1;
    const auto [low, high] = std::minmax_element(x.begin(), x.end());
    const double lowest = shape_.form.clip * std::min(0.0f, *low);
    const double span = shape_.form.clip * std::max(0.0f, *high) - lowest;
    uint32_t grid =
        std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); }) ? 0 : 0x7fffff00;
    if (grid == 0 && span >= 0x1p-100) {
      grid = (std::bit_cast<uint32_t>(static_cast<float>(span / levels)) + 0x80) & ~0xffu;
      grid |= static_cast<uint32_t>(std::min(levels, std::nearbyint(-lowest / ScaleOf(grid))));
    }
    std::memcpy(grids_ + first / group_size() * 4, &grid, sizeof(grid));
    const double zero = grid & 0xff;
    for (size_t i = 0; i < x.size(); ++i) {
      const double place = ScaleOf(grid) > 0 ? std::nearbyint(x[i] / ScaleOf(grid)) + zero : zero;
      const auto code = static_cast<uint8_t>(std::clamp(place, 0.0, levels));
      const int64_t at = first + static_cast<int64_t>(i);
      if (shape_.form.bits == 8) {
        values_[at] = code;
      } else {
        uint8_t& both = values_[NibbleOf(at) / 2];
        both = static_cast<uint8_t>((both & ~(15 << Shift(at))) | code << Shift(at));
      }
    }
  }

  const KvPoolShape shape_;
  uint8_t* values_;
  uint8_t* grids_;
};

// x ← x · R3, by the definition of the matrix. is_ordered: whether the order of Walsh counts.
template <typename Real>
void TransformHead(HeadTransform transform, bool is_ordered, std::vector<Real>& x) {
  if (transform == HeadTransform::kNone) return;
  const size_t n = x.size();
  std::vector<Real> y(n);
  for (size_t column = 0; column < n; ++column) {
    double sum = 0;
    for (size_t row = 0; row < n; ++row) {
      sum += std::popcount(row & column) % 2 == 0 ? x[row] : -x[row];
    }
    // The columns' numbers of sign changes, which are their places by sequency.
    size_t n_changes = 0;
    for (size_t row = 1; row < n; ++row) {
      n_changes += std::popcount(row & column) % 2 != std::popcount((row - 1) & column) % 2;
    }
    const bool is_sorted = transform == HeadTransform::kWalsh && is_ordered;
    y[is_sorted ? n_changes : column] = static_cast<Real>(sum / std::sqrt(static_cast<double>(n)));
  }
  x = std::move(y);
}

}  // namespace walsh::testing
