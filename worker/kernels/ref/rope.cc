#include <cmath>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status Rope(const RopeParams& p, const Stream& /*stream*/) {
  const int64_t half = p.head_dim / 2;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    for (int64_t h = 0; h < p.n_heads; ++h) {
      float* x = p.x + t * p.x_stride + h * p.head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(p.positions[t]) * p.inverse_frequencies[i];
        const double cosine = std::cos(angle);
        const double sine = std::sin(angle);
        const double first = x[i];
        const double second = x[i + half];
        x[i] = static_cast<float>(first * cosine - second * sine);
        x[i + half] = static_cast<float>(second * cosine + first * sine);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
