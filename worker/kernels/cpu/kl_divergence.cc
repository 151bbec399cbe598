#include <algorithm>
#include <cmath>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/kl_divergence.cc"
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

// With weights eᵢ = exp(pᵢ − max p) and their sum Z, log p − log q is (pᵢ − qᵢ) + c, where c is the
// difference of the normalizers: KL = Σ eᵢ ((pᵢ − qᵢ) + c) / Z. Exponentials are in float, like
// those of CrossEntropy, and everything else in double; Z is of the same eᵢ, so that their errors
// cancel and equal rows give exactly 0.
double KlDivergenceRow(const float* p, const float* q, int64_t vocab) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const auto lanes = static_cast<int64_t>(hn::Lanes(wide));
  const float highest_p = *std::max_element(p, p + vocab);
  const float highest_q = *std::max_element(q, q + vocab);
  const auto offset_p = hn::Set(narrow, highest_p);
  const auto offset_q = hn::Set(narrow, highest_q);
  auto sums_p = hn::Zero(wide), sums_q = hn::Zero(wide), products = hn::Zero(wide);
  int64_t i = 0;
  for (; i + lanes <= vocab; i += lanes) {
    const auto x = hn::LoadU(narrow, p + i);
    const auto y = hn::LoadU(narrow, q + i);
    const auto weight = hn::PromoteTo(wide, hn::Exp(narrow, hn::Sub(x, offset_p)));
    sums_p = hn::Add(sums_p, weight);
    sums_q = hn::Add(sums_q, hn::PromoteTo(wide, hn::Exp(narrow, hn::Sub(y, offset_q))));
    const auto difference = hn::Sub(hn::PromoteTo(wide, x), hn::PromoteTo(wide, y));
    products = hn::Add(products, hn::Mul(weight, difference));
  }
  double sum_p = hn::GetLane(hn::SumOfLanes(wide, sums_p));
  double sum_q = hn::GetLane(hn::SumOfLanes(wide, sums_q));
  double product = hn::GetLane(hn::SumOfLanes(wide, products));
  for (; i < vocab; ++i) {
    const double weight = std::exp(static_cast<double>(p[i]) - static_cast<double>(highest_p));
    sum_p += weight;
    sum_q += std::exp(static_cast<double>(q[i]) - static_cast<double>(highest_q));
    product += weight * (static_cast<double>(p[i]) - static_cast<double>(q[i]));
  }
  const double normalizers = (static_cast<double>(highest_q) - static_cast<double>(highest_p)) +
                             (std::log(sum_q) - std::log(sum_p));
  return product / sum_p + normalizers;
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {
namespace {

int64_t ArgMax(const float* x, int64_t n) { return std::max_element(x, x + n) - x; }

}  // namespace

HWY_EXPORT(KlDivergenceRow);

absl::Status KlDivergence(const KlDivergenceParams& params, const Stream& stream) {
  const int64_t vocab = params.vocab;
  ForEachRowRange(stream, params.n_tokens, vocab, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const float* p = params.reference + row * vocab;
      const float* q = params.logits + row * vocab;
      params.divergence[row] = HWY_DYNAMIC_DISPATCH(KlDivergenceRow)(p, q, vocab);
      params.agrees[row] = ArgMax(p, vocab) == ArgMax(q, vocab);
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
