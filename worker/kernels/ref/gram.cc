#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status Gram(const GramParams& p, const Stream& /*stream*/) {
  for (int64_t i = 0; i < p.dim; ++i) {
    for (int64_t j = 0; j < p.dim; ++j) {
      double sum = p.h[i * p.dim + j];
      for (int64_t t = 0; t < p.n_tokens; ++t) {
        sum += static_cast<double>(p.x[t * p.x_stride + i]) * p.x[t * p.x_stride + j];
      }
      p.h[i * p.dim + j] = static_cast<float>(sum);
    }
  }
  return absl::OkStatus();
}

absl::Status CrossGram(const CrossGramParams& p, const Stream& /*stream*/) {
  for (int64_t i = 0; i < p.dim; ++i) {
    for (int64_t j = 0; j < p.dim; ++j) {
      double sum = p.c[i * p.dim + j];
      for (int64_t t = 0; t < p.n_tokens; ++t) {
        sum += static_cast<double>(p.x[t * p.x_stride + i]) * p.y[t * p.y_stride + j];
      }
      p.c[i * p.dim + j] = static_cast<float>(sum);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
