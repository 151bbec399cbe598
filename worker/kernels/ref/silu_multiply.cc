#include <cmath>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status SiluMultiply(const SiluMultiplyParams& p, const Stream& /*stream*/) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double gate = p.gate[t * p.gate_stride + i];
      const double silu = gate / (1.0 + std::exp(-gate));
      p.y[t * p.y_stride + i] = static_cast<float>(silu * p.up[t * p.up_stride + i]);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
