#include "worker/engine/logits.h"

#include <algorithm>
#include <limits>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/engine/logits.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace walsh::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The largest of a block, and whether it has a NaN, which comparisons pass over in silence.
struct Peak {
  float max = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
};

Peak PeakOf(const float* x, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  Peak peak;
  int64_t i = 0;
  if (n >= 2 * lanes) {
    auto max0 = hn::Set(d, peak.max);
    auto max1 = max0;
    auto nan = hn::IsNaN(max0);
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const auto x0 = hn::LoadU(d, x + i);
      const auto x1 = hn::LoadU(d, x + i + lanes);
      nan = hn::Or(nan, hn::Or(hn::IsNaN(x0), hn::IsNaN(x1)));
      max0 = hn::Max(max0, x0);
      max1 = hn::Max(max1, x1);
    }
    peak.max = hn::GetLane(hn::MaxOfLanes(d, hn::Max(max0, max1)));
    peak.has_nan = !hn::AllFalse(d, nan);
  }
  for (; i < n; ++i) {
    peak.has_nan |= x[i] != x[i];
    peak.max = std::max(peak.max, x[i]);
  }
  return peak;
}

int64_t FindFirst(const float* x, int64_t n, float value) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto wanted = hn::Set(d, value);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto found = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, x + i), wanted));
    if (found >= 0) return i + static_cast<int64_t>(found);
  }
  while (i < n && x[i] != value) ++i;
  return i;
}

int64_t ArgMaxRow(const float* x, int64_t n) {
  constexpr int64_t kBlock = 2048;  // is searched again, while it is in the nearest cache
  Peak highest;
  int64_t first_of_block = -1;
  for (int64_t i = 0; i < n; i += kBlock) {
    const Peak peak = PeakOf(x + i, std::min(kBlock, n - i));
    if (peak.has_nan) return -1;
    if (peak.max > highest.max) {
      highest = peak;
      first_of_block = i;
    }
  }
  if (first_of_block < 0) return -1;
  return first_of_block +
         FindFirst(x + first_of_block, std::min(kBlock, n - first_of_block), highest.max);
}

template <class D>
hn::Vec<D> WeightsStep(D d, const float* logits, float max, float scale, float floor) {
  const auto x = hn::LoadU(d, logits);
  const auto weight = hn::Exp(d, hn::Mul(hn::Sub(x, hn::Set(d, max)), hn::Set(d, scale)));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, floor)), weight);
}

// One block: Σ in double, as the weights of a vocabulary are many and small.
double WeightsBlock(const float* logits, int64_t n, float max, float scale, float floor,
                    float* weights) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const hn::CappedTag<float, 1> one_lane;
  const auto lanes = static_cast<int64_t>(hn::Lanes(wide));
  auto sums = hn::Zero(wide);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto weight = WeightsStep(narrow, logits + i, max, scale, floor);
    hn::StoreU(weight, narrow, weights + i);
    sums = hn::Add(sums, hn::PromoteTo(wide, weight));
  }
  double sum = hn::GetLane(hn::SumOfLanes(wide, sums));
  for (; i < n; ++i) {
    hn::StoreU(WeightsStep(one_lane, logits + i, max, scale, floor), one_lane, weights + i);
    sum += weights[i];
  }
  return sum;
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::engine {

HWY_EXPORT(ArgMaxRow);
HWY_EXPORT(WeightsBlock);

int64_t ArgMax(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(ArgMaxRow)(values.data(), static_cast<int64_t>(values.size()));
}

void ExpWeights(const ExpWeightsParams& p) {
  // Finite, so that the largest logit keeps its weight of exp(0 · scale) = 1.
  const auto scale = static_cast<float>(std::min(1.0 / p.temperature, 1e30));
  const auto n = static_cast<int64_t>(p.logits.size());
  for (int64_t i = 0; i < n; i += kWeightsBlock) {
    p.sums[i / kWeightsBlock] =
        HWY_DYNAMIC_DISPATCH(WeightsBlock)(p.logits.data() + i, std::min(kWeightsBlock, n - i),
                                           p.max_logit, scale, p.floor, p.weights + i);
  }
}

}  // namespace walsh::engine
#endif  // HWY_ONCE
