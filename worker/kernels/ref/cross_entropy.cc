#include <algorithm>
#include <cmath>

#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status CrossEntropy(const CrossEntropyParams& p, const Stream& /*stream*/) {
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    const float* logits = p.logits + t * p.vocab;
    const double highest = *std::max_element(logits, logits + p.vocab);
    double sum = 0;
    for (int64_t i = 0; i < p.vocab; ++i) sum += std::exp(logits[i] - highest);
    p.loss[t] = highest + std::log(sum) - logits[p.targets[t]];
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
