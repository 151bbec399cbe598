#include <algorithm>
#include <cmath>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {
namespace {

double LogSumExp(const float* x, int64_t n) {
  const double highest = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - highest);
  return highest + std::log(sum);
}

}  // namespace

absl::Status KlDivergence(const KlDivergenceParams& params, const Stream& /*stream*/) {
  const int64_t vocab = params.vocab;
  for (int64_t t = 0; t < params.n_tokens; ++t) {
    const float* p = params.reference + t * vocab;
    const float* q = params.logits + t * vocab;
    const double log_sum_p = LogSumExp(p, vocab);
    const double log_sum_q = LogSumExp(q, vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      const double log_p = p[i] - log_sum_p;
      const double log_q = q[i] - log_sum_q;
      sum += std::exp(log_p) * (log_p - log_q);
    }
    params.divergence[t] = sum;
    params.agrees[t] = std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q;
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
