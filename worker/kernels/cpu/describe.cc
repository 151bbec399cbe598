#include "absl/strings/str_cat.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/packed_matmul.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels {

std::string DescribeCpuBackend() {
  const absl::StatusOr<const cpu::Blas*> blas = cpu::OpenBlas();
  return absl::StrCat(cpu::BestPackedKernel().name, "; ",
                      blas.ok() ? absl::StrCat((*blas)->version, " core ", (*blas)->core)
                                : std::string(blas.status().message()));
}

}  // namespace walsh::kernels
