#include <cmath>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/cross_entropy.cc"
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

float MaxOf(const float* x, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  float highest = x[0];
  int64_t i = 0;
  if (n >= lanes) {
    auto max = hn::LoadU(d, x);
    for (i = lanes; i + lanes <= n; i += lanes) max = hn::Max(max, hn::LoadU(d, x + i));
    highest = hn::GetLane(hn::MaxOfLanes(d, max));
  }
  for (; i < n; ++i) highest = std::max(highest, x[i]);
  return highest;
}

// Σ exp(x − highest): each term in float, their sum in double, since a vocabulary has 10⁵ of them.
double SumOfExp(const float* x, int64_t n, float highest) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const auto lanes = static_cast<int64_t>(hn::Lanes(wide));
  const auto offset = hn::Set(narrow, highest);
  auto sums = hn::Zero(wide);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto term = hn::Exp(narrow, hn::Sub(hn::LoadU(narrow, x + i), offset));
    sums = hn::Add(sums, hn::PromoteTo(wide, term));
  }
  double sum = hn::GetLane(hn::SumOfLanes(wide, sums));
  for (; i < n; ++i) sum += std::exp(static_cast<double>(x[i]) - static_cast<double>(highest));
  return sum;
}

double CrossEntropyRow(const float* logits, int64_t vocab, int32_t target) {
  const float highest = MaxOf(logits, vocab);
  return static_cast<double>(highest) + std::log(SumOfExp(logits, vocab, highest)) -
         static_cast<double>(logits[target]);
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(CrossEntropyRow);

absl::Status CrossEntropy(const CrossEntropyParams& p, const Stream& stream) {
  ForEachRowRange(stream, p.n_tokens, p.vocab, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      p.loss[row] =
          HWY_DYNAMIC_DISPATCH(CrossEntropyRow)(p.logits + row * p.vocab, p.vocab, p.targets[row]);
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
