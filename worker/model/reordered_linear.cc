#include "worker/model/reordered_linear.h"

namespace walsh {

absl::Status ReorderedLinear::Apply(const float* x, int64_t n_tokens, float* y,
                                    const kernels::Stream& stream) const {
  std::vector<float> gathered(static_cast<size_t>(n_tokens * in()));
  float* to = gathered.data();
  for (int64_t token = 0; token < n_tokens; ++token) {
    const float* from = x + token * in();
    for (const int32_t input : order_) *to++ = from[input];
  }
  return linear_->Apply(gathered.data(), n_tokens, y, stream);
}

}  // namespace walsh
