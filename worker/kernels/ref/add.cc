#include "worker/kernels/kernels.h"

namespace walsh::kernels::ref {

absl::Status Add(const AddParams& p, const Stream& /*stream*/) {
  for (int64_t i = 0; i < p.n; ++i) p.y[i] += p.x[i];
  return absl::OkStatus();
}

}  // namespace walsh::kernels::ref
