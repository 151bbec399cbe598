#include <vector>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sines and cosines of position · frequency. The angle and its remainder by 2π are taken in double:
// at position 8,000 a float angle would already be wrong by 5e-4.
template <class D>
void Angles(D d, double position, const float* frequency, float* cosine, float* sine) {
  const hn::Rebind<double, D> dd;
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const auto angle = hn::Mul(hn::Set(dd, position), hn::PromoteTo(dd, hn::LoadU(d, frequency)));
  const auto turns = hn::Round(hn::Mul(angle, hn::Set(dd, 1.0 / kTwoPi)));
  const auto reduced = hn::DemoteTo(d, hn::NegMulAdd(turns, hn::Set(dd, kTwoPi), angle));
  hn::StoreU(hn::Cos(d, reduced), d, cosine);
  hn::StoreU(hn::Sin(d, reduced), d, sine);
}

template <class D>
void Rotate(D d, const float* cosine, const float* sine, float* first, float* second) {
  const auto c = hn::LoadU(d, cosine);
  const auto s = hn::LoadU(d, sine);
  const auto a = hn::LoadU(d, first);
  const auto b = hn::LoadU(d, second);
  hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, first);
  hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, second);
}

// `angles` is scratch for head_dim floats.
void RopeRow(const RopeParams& p, int64_t row, float* angles) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;  // the floats that one vector of doubles holds
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> one_lane;
  const auto narrow_lanes = static_cast<int64_t>(hn::Lanes(narrow));
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t half = p.head_dim / 2;
  float* cosine = angles;
  float* sine = angles + half;
  const double position = p.positions[row];
  int64_t i = 0;
  for (; i + narrow_lanes <= half; i += narrow_lanes) {
    Angles(narrow, position, p.inverse_frequencies + i, cosine + i, sine + i);
  }
  for (; i < half; ++i) {
    Angles(one_lane, position, p.inverse_frequencies + i, cosine + i, sine + i);
  }
  for (int64_t head = 0; head < p.n_heads; ++head) {
    float* first = p.x + row * p.x_stride + head * p.head_dim;
    float* second = first + half;
    int64_t j = 0;
    for (; j + lanes <= half; j += lanes) Rotate(d, cosine + j, sine + j, first + j, second + j);
    for (; j < half; ++j) Rotate(one_lane, cosine + j, sine + j, first + j, second + j);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(RopeRow);

absl::Status Rope(const RopeParams& p, const Stream& stream) {
  ForEachRowRange(stream, p.n_tokens, p.n_heads * p.head_dim, [&](int64_t first, int64_t end) {
    std::vector<float> angles(static_cast<size_t>(p.head_dim));
    for (int64_t row = first; row < end; ++row) {
      HWY_DYNAMIC_DISPATCH(RopeRow)(p, row, angles.data());
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
