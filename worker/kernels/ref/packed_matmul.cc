#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {
namespace {

// The rounded values of one block of activations, as packed_matrix.h states the rule.
void RoundBlock(const float* x, int64_t n, double* rounded) {
  float highest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    highest = std::max(highest, std::fabs(x[i]));
  }
  const float scale = highest / 127.0f;
  const float inverse = 127.0f / highest;
  for (int64_t i = 0; i < n; ++i) {
    if (!finite) {
      rounded[i] = std::numeric_limits<double>::quiet_NaN();
    } else if (highest < 0x1p-100f) {
      rounded[i] = 0;
    } else {
      rounded[i] = static_cast<double>(scale) * std::nearbyint(x[i] * inverse);
    }
  }
}

}  // namespace

absl::Status PackedMatmul(const PackedMatmulParams& p, const Stream& /*stream*/) {
  const int64_t cols = p.weights->cols();
  const Matrix weights = p.weights->Dequantize();
  std::vector<double> x(static_cast<size_t>(cols));
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    for (int64_t first = 0; first < cols; first += kActivationBlock) {
      RoundBlock(p.x + t * p.x_stride + first, std::min(kActivationBlock, cols - first),
                 x.data() + first);
    }
    for (int64_t row = 0; row < weights.rows(); ++row) {
      double sum = p.bias == nullptr ? 0.0 : static_cast<double>(p.bias[row]);
      for (int64_t col = 0; col < cols; ++col) sum += weights(row, col) * x[col];
      p.y[t * p.y_stride + row] = static_cast<float>(sum);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
