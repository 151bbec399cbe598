#include <cmath>
#include <numbers>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status GeluMultiply(const GeluMultiplyParams& p, const Stream& /*stream*/) {
  const double slope = std::sqrt(2.0 * std::numbers::inv_pi);
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double gate = p.gate[t * p.gate_stride + i];
      const double inner = slope * (gate + 0.044715 * gate * gate * gate);
      const double gelu = 0.5 * gate * (1.0 + std::tanh(inner));
      p.y[t * p.y_stride + i] = static_cast<float>(gelu * p.up[t * p.up_stride + i]);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
