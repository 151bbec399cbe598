#include <cmath>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status RmsNorm(const RmsNormParams& p, const Stream& /*stream*/) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    const float* x = p.x + t * p.dim;
    double sum = 0;
    for (int64_t i = 0; i < p.dim; ++i) sum += static_cast<double>(x[i]) * x[i];
    const double inverse = 1.0 / std::sqrt(sum / static_cast<double>(p.dim) + p.eps);
    for (int64_t i = 0; i < p.dim; ++i) {
      const double weight = p.weight == nullptr ? 1.0 : static_cast<double>(p.weight[i]);
      p.y[t * p.dim + i] = static_cast<float>(x[i] * inverse * weight);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
