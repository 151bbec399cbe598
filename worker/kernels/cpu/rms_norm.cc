#include <cmath>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/rms_norm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

float SumOfSquares(const float* HWY_RESTRICT x, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const auto x0 = hn::LoadU(d, x + i);
    const auto x1 = hn::LoadU(d, x + i + lanes);
    sum0 = hn::MulAdd(x0, x0, sum0);
    sum1 = hn::MulAdd(x1, x1, sum1);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

void RmsNormRow(const RmsNormParams& p, int64_t row) {
  const float* x = p.x + row * p.dim;
  float* y = p.y + row * p.dim;
  const float mean = SumOfSquares(x, p.dim) / static_cast<float>(p.dim);
  const float inverse = 1.0f / std::sqrt(mean + p.eps);
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto inverses = hn::Set(d, inverse);
  int64_t i = 0;
  for (; i + lanes <= p.dim; i += lanes) {
    auto v = hn::Mul(hn::LoadU(d, x + i), inverses);
    if (p.weight != nullptr) v = hn::Mul(v, hn::LoadU(d, p.weight + i));
    hn::StoreU(v, d, y + i);
  }
  for (; i < p.dim; ++i) {
    const float v = x[i] * inverse;
    y[i] = p.weight == nullptr ? v : v * p.weight[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(RmsNormRow);

absl::Status RmsNorm(const RmsNormParams& p, const Stream& stream) {
  ForEachRowRange(stream, p.n_tokens, p.dim, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) HWY_DYNAMIC_DISPATCH(RmsNormRow)(p, row);
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
