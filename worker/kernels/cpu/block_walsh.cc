// The fast Walsh–Hadamard transform: log2(block) passes of additions over a block that stays in the
// first-level cache, then, for sequency order, one permutation.
#include <bit>
#include <cmath>
#include <vector>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/block_walsh.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class D>
void Butterfly(D d, float* low, float* high) {
  const auto a = hn::LoadU(d, low);
  const auto b = hn::LoadU(d, high);
  hn::StoreU(hn::Add(a, b), d, low);
  hn::StoreU(hn::Sub(a, b), d, high);
}

template <class D>
void Pass(D d, float* x, int64_t n, int64_t distance) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t first = 0; first < n; first += 2 * distance) {
    for (int64_t i = first; i < first + distance; i += lanes) Butterfly(d, x + i, x + i + distance);
  }
}

// Unnormalized, natural order, in place.
void Hadamard(float* x, int64_t n) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 8> eight;
  const hn::CappedTag<float, 4> four;
  const hn::CappedTag<float, 2> two;
  const hn::CappedTag<float, 1> one;
  for (int64_t distance = 1; distance < n; distance *= 2) {
    if (distance >= static_cast<int64_t>(hn::Lanes(d))) {
      Pass(d, x, n, distance);
    } else if (distance >= static_cast<int64_t>(hn::Lanes(eight))) {
      Pass(eight, x, n, distance);
    } else if (distance >= static_cast<int64_t>(hn::Lanes(four))) {
      Pass(four, x, n, distance);
    } else if (distance >= static_cast<int64_t>(hn::Lanes(two))) {
      Pass(two, x, n, distance);
    } else {
      Pass(one, x, n, distance);
    }
  }
}

// `order` is null for natural order; `scratch` holds a block.
void BlockWalshRow(float* row, int64_t cols, int64_t block, const int32_t* order, float norm,
                   float* scratch) {
  for (int64_t first = 0; first < cols; first += block) {
    float* x = row + first;
    for (int64_t i = 0; i < block; ++i) scratch[i] = x[i] * norm;
    Hadamard(scratch, block);
    for (int64_t i = 0; i < block; ++i) x[i] = scratch[order == nullptr ? i : order[i]];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {
namespace {

HWY_EXPORT(BlockWalshRow);

// The natural row that has sequency s: the bit-reversed Gray code of s.
std::vector<int32_t> SequencyOrder(int64_t block) {
  const int n_bits = std::countr_zero(static_cast<uint64_t>(block));
  std::vector<int32_t> order(static_cast<size_t>(block));
  for (int64_t s = 0; s < block; ++s) {
    const int64_t gray = s ^ (s >> 1);
    int64_t reversed = 0;
    for (int bit = 0; bit < n_bits; ++bit) {
      reversed |= ((gray >> bit) & 1) << (n_bits - 1 - bit);
    }
    order[static_cast<size_t>(s)] = static_cast<int32_t>(reversed);
  }
  return order;
}

}  // namespace

absl::Status BlockWalsh(const BlockWalshParams& p, const Stream& stream) {
  std::vector<int32_t> order;
  if (p.sequency) order = SequencyOrder(p.block);
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.block)));
  ForEachRowRange(stream, p.rows, p.cols, [&](int64_t first, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(p.block));
    for (int64_t row = first; row < end; ++row) {
      HWY_DYNAMIC_DISPATCH(BlockWalshRow)
      (p.x + row * p.x_stride, p.cols, p.block, p.sequency ? order.data() : nullptr, norm,
       scratch.data());
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
