#include <algorithm>
#include <cmath>
#include <vector>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status Attention(const AttentionParams& p, const Stream& /*stream*/) {
  const int64_t heads_per_kv = p.n_heads / p.n_kv_heads;
  std::vector<double> weight(static_cast<size_t>(p.n_past + p.n_new));
  for (int64_t i = 0; i < p.n_new; ++i) {
    const int64_t n_keys = p.n_past + i + 1;
    const int64_t first = p.window > 0 ? std::max<int64_t>(0, n_keys - p.window) : 0;
    for (int64_t h = 0; h < p.n_heads; ++h) {
      const float* q = p.q + i * p.q_stride + h * p.head_dim;
      const float* k = p.k + h / heads_per_kv * p.head_dim;
      const float* v = p.v + h / heads_per_kv * p.head_dim;
      for (int64_t j = first; j < n_keys; ++j) {
        double score = 0;
        for (int64_t d = 0; d < p.head_dim; ++d) {
          score += static_cast<double>(q[d]) * k[p.KvOffset(j) + d];
        }
        weight[j] = score * p.scale;
      }
      const double highest = *std::max_element(weight.begin() + first, weight.begin() + n_keys);
      double sum = 0;
      for (int64_t j = first; j < n_keys; ++j) {
        weight[j] = std::exp(weight[j] - highest);
        sum += weight[j];
      }
      for (int64_t d = 0; d < p.head_dim; ++d) {
        double y = 0;
        for (int64_t j = first; j < n_keys; ++j) y += weight[j] / sum * v[p.KvOffset(j) + d];
        p.y[i * p.y_stride + h * p.head_dim + d] = static_cast<float>(y);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
