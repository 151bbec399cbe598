#include "worker/kernels/cpu/blas.h"

#include <dlfcn.h>

#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/status_macros.h"
#include "worker/kernels/cpu/cpu_features.h"

namespace walsh::kernels::cpu {
namespace {

constexpr char kLibrary[] = "libopenblas.so.0";

// The core type whose kernels use all that this CPU has, or null to leave the choice to OpenBLAS.
const char* CoreType() {
  const CpuFeatures& features = GetCpuFeatures();
  if (features.avx512) return "SkylakeX";
  if (features.avx2_fma) return "Haswell";
  return nullptr;
}

template <typename Function>
absl::Status Resolve(void* library, const char* name, Function* function) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(kLibrary, " has no function ", name));
  }
  *function = reinterpret_cast<Function>(symbol);
  return absl::OkStatus();
}

absl::StatusOr<const Blas*> Load() {
  constexpr int kKeepExisting = 0;
  // An operator's own choice wins, as it does for every program that uses OpenBLAS.
  if (const char* core = CoreType(); core != nullptr) {
    setenv("OPENBLAS_CORETYPE", core, kKeepExisting);
  }
  setenv("OPENBLAS_NUM_THREADS", "1", /*overwrite=*/1);
  // Local: its symbols (LAPACK's among them) must not take the place of another library's.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(
        kLibrary, " cannot be loaded; install OpenBLAS (Debian: libopenblas0-pthread)"));
  }
  static Blas blas;
  WALSH_RETURN_IF_ERROR(Resolve(library, "cblas_sgemm", &blas.sgemm));
  WALSH_RETURN_IF_ERROR(Resolve(library, "cblas_ssyrk", &blas.ssyrk));
  WALSH_RETURN_IF_ERROR(Resolve(library, "spotrf_", &blas.spotrf));
  WALSH_RETURN_IF_ERROR(Resolve(library, "dpotrf_", &blas.dpotrf));
  WALSH_RETURN_IF_ERROR(Resolve(library, "strtri_", &blas.strtri));
  WALSH_RETURN_IF_ERROR(Resolve(library, "dtrtri_", &blas.dtrtri));
  char* (*core_name)() = nullptr;
  WALSH_RETURN_IF_ERROR(Resolve(library, "openblas_get_corename", &core_name));
  blas.core = core_name();
  char* (*config)() = nullptr;
  WALSH_RETURN_IF_ERROR(Resolve(library, "openblas_get_config", &config));
  // "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH …"
  const std::vector<std::string> words = absl::StrSplit(config(), ' ');
  blas.version = absl::StrCat(words[0], " ", words.size() > 1 ? words[1] : "unknown");
  return &blas;
}

}  // namespace

absl::StatusOr<const Blas*> OpenBlas() {
  static const absl::StatusOr<const Blas*> blas = Load();
  return blas;
}

}  // namespace walsh::kernels::cpu
