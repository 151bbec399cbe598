// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/gelu_multiply.cc"
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

template <class D>
void GeluMultiplyStep(D d, const float* gate, const float* up, float* y) {
  // x/2 · (1 + tanh(u)) is x / (1 + exp(−2u)).
  constexpr float kSlope = 1.5957691216057308f;  // 2 · sqrt(2 / π)
  const auto one = hn::Set(d, 1.0f);
  const auto x = hn::LoadU(d, gate);
  const auto cubic = hn::MulAdd(hn::Mul(x, x), hn::Set(d, 0.044715f), one);
  // exp(88) is finite, and beyond it gelu is below the smallest float anyway.
  const auto power =
      hn::Min(hn::Neg(hn::Mul(hn::Mul(hn::Set(d, kSlope), x), cubic)), hn::Set(d, 88.0f));
  const auto gelu = hn::Div(x, hn::Add(one, hn::Exp(d, power)));
  hn::StoreU(hn::Mul(gelu, hn::LoadU(d, up)), d, y);
}

void GeluMultiplyRow(const float* gate, const float* up, int64_t n, float* y) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> one_lane;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) GeluMultiplyStep(d, gate + i, up + i, y + i);
  for (; i < n; ++i) GeluMultiplyStep(one_lane, gate + i, up + i, y + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(GeluMultiplyRow);

absl::Status GeluMultiply(const GeluMultiplyParams& p, const Stream& stream) {
  ForEachRowRange(stream, p.n_tokens, p.dim, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      HWY_DYNAMIC_DISPATCH(GeluMultiplyRow)
      (p.gate + row * p.gate_stride, p.up + row * p.up_stride, p.dim, p.y + row * p.y_stride);
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
