#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status SubtractProduct(const SubtractProductParams& p, const Stream& /*stream*/) {
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < p.k; ++l) {
        sum += static_cast<double>(p.a[i * p.a_stride + l]) * p.b[l * p.b_stride + j];
      }
      float& c = p.c[i * p.c_stride + j];
      c = static_cast<float>(c - sum);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
