// Two passes over a group that stays in the first-level cache: its range, then its values.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/fake_quantize.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct Range {
  float low = 0;   // ≤ 0
  float high = 0;  // ≥ 0
  bool is_finite = true;
};

Range RangeOf(const float* x, int64_t n) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto low = hn::Zero(d), high = hn::Zero(d);
  // Magnitudes compared as integers: a value that is not finite is larger than every finite one.
  auto magnitude = hn::Zero(di);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    low = hn::Min(low, v);
    high = hn::Max(high, v);
    magnitude = hn::Max(magnitude, hn::BitCast(di, hn::Abs(v)));
  }
  Range range{hn::GetLane(hn::MinOfLanes(d, low)), hn::GetLane(hn::MaxOfLanes(d, high))};
  const float largest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, magnitude)));
  range.is_finite = std::isfinite(largest);
  for (; i < n; ++i) {
    range.low = std::min(range.low, x[i]);
    range.high = std::max(range.high, x[i]);
    range.is_finite = range.is_finite && std::isfinite(x[i]);
  }
  return range;
}

void QuantizeGroup(float* x, int64_t n, int bits, bool symmetric, float clip) {
  const Range range = RangeOf(x, n);
  if (!range.is_finite) {
    std::fill_n(x, n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const double high = double{clip} * range.high, low = double{clip} * range.low;
  const double levels = std::ldexp(1.0, symmetric ? bits - 1 : bits) - 1;
  const double span = symmetric ? std::max(high, -low) : high - low;
  if (span < 0x1p-100) {
    std::fill_n(x, n, 0.0f);
    return;
  }
  const double scale = span / levels;
  const double zero = symmetric ? levels + 1 : std::nearbyint(-low / scale);

  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto step = hn::Set(d, static_cast<float>(scale));
  const auto inverse = hn::Set(d, static_cast<float>(1.0 / scale));
  const auto first = hn::Set(d, static_cast<float>(-zero));
  const auto last = hn::Set(d, static_cast<float>(symmetric ? levels : levels - zero));
  const auto quantize = [&](auto v) {
    const auto code = hn::Round(hn::Mul(v, inverse));
    return hn::Mul(step, hn::Min(hn::Max(code, first), last));
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(quantize(hn::LoadU(d, x + i)), d, x + i);
  if (i == n) return;
  HWY_ALIGN float rest[HWY_MAX_BYTES / sizeof(float)] = {};
  const auto n_rest = static_cast<size_t>(n - i);
  std::memcpy(rest, x + i, n_rest * sizeof(float));
  hn::Store(quantize(hn::Load(d, rest)), d, rest);
  std::memcpy(x + i, rest, n_rest * sizeof(float));
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(QuantizeGroup);

absl::Status FakeQuantize(const FakeQuantizeParams& p, const Stream& stream) {
  ForEachRowRange(stream, p.rows, p.cols, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      for (int64_t col = 0; col < p.cols; col += p.group) {
        HWY_DYNAMIC_DISPATCH(QuantizeGroup)
        (p.x + row * p.x_stride + col, p.group, p.bits, p.symmetric, p.clip);
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
