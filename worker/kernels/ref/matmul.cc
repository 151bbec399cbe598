#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status Matmul(const MatmulParams& p, const Stream& /*stream*/) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    for (int64_t o = 0; o < p.out; ++o) {
      double sum = p.bias == nullptr ? 0.0 : static_cast<double>(p.bias[o]);
      for (int64_t i = 0; i < p.in; ++i) {
        sum += static_cast<double>(p.x[t * p.x_stride + i]) * p.weights[o * p.in + i];
      }
      float& y = p.y[t * p.y_stride + o];
      y = static_cast<float>(p.accumulate ? sum + y : sum);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
