#include <algorithm>
#include <cmath>
#include <limits>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {
namespace {

void QuantizeGroup(const FakeQuantizeParams& p, float* x) {
  if (!std::all_of(x, x + p.group, [](float v) { return std::isfinite(v); })) {
    std::fill_n(x, p.group, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const double clip = p.clip;
  const double high = clip * std::max(0.0f, *std::max_element(x, x + p.group));
  const double low = clip * std::min(0.0f, *std::min_element(x, x + p.group));
  const double levels = std::ldexp(1.0, p.symmetric ? p.bits - 1 : p.bits) - 1;
  const double span = p.symmetric ? std::max(high, -low) : high - low;
  if (span < 0x1p-100) {
    std::fill_n(x, p.group, 0.0f);
    return;
  }
  const double scale = span / levels;
  const double zero = p.symmetric ? levels + 1 : std::nearbyint(-low / scale);
  const double last = p.symmetric ? levels : levels - zero;
  for (int64_t i = 0; i < p.group; ++i) {
    x[i] = static_cast<float>(scale * std::clamp(std::nearbyint(x[i] / scale), -zero, last));
  }
}

}  // namespace

absl::Status FakeQuantize(const FakeQuantizeParams& p, const Stream& /*stream*/) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t first = 0; first < p.cols; first += p.group) {
      QuantizeGroup(p, p.x + row * p.x_stride + first);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
