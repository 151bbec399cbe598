// Cholesky factor and triangular inverse through LAPACK.
//
// LAPACK is column-major: the row-major lower triangle L of A is its upper triangle Lᵀ, and
// A = L Lᵀ = (Lᵀ)ᵀ (Lᵀ) is what potrf computes for "U".
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels {
namespace {

template <typename T>
absl::Status CheckSquare(const char* op, int64_t n, const T* a) {
  if (n < 0 || n > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": n must be in [0, 2^31), is ", n));
  }
  if (a == nullptr && n > 0) return absl::InvalidArgumentError(absl::StrCat(op, ": a is null"));
  return absl::OkStatus();
}

template <typename T, typename Potrf>
absl::Status Factor(int64_t n, T* a, Potrf potrf) {
  const int size = static_cast<int>(n);
  int info = 0;
  potrf("U", &size, a, &size, &info);
  if (info > 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "CholeskyLower: the matrix is not positive definite: leading minor ", info, " of ", n));
  }
  if (info < 0) return absl::InternalError(absl::StrCat("potrf: argument ", -info));
  // potrf compares pivots with zero, which a NaN passes in some of its kernels.
  for (int64_t i = 0; i < n; ++i) {
    if (!(a[i * n + i] > 0)) {
      return absl::FailedPreconditionError(
          absl::StrCat("CholeskyLower: the matrix is not positive definite: pivot ", i, " of ", n,
                       " is ", static_cast<double>(a[i * n + i])));
    }
    for (int64_t j = i + 1; j < n; ++j) a[i * n + j] = 0;
  }
  return absl::OkStatus();
}

template <typename T, typename Trtri>
absl::Status Invert(int64_t n, T* a, Trtri trtri) {
  const int size = static_cast<int>(n);
  int info = 0;
  trtri("U", "N", &size, a, &size, &info);
  if (info > 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("InvertLower: diagonal element ", info - 1, " of ", n, " is zero"));
  }
  if (info < 0) return absl::InternalError(absl::StrCat("trtri: argument ", -info));
  return absl::OkStatus();
}

}  // namespace

absl::Status CholeskyLower(int64_t n, float* a) {
  WALSH_RETURN_IF_ERROR(CheckSquare("CholeskyLower", n, a));
  if (n == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const cpu::Blas* blas, cpu::OpenBlas());
  return Factor(n, a, blas->spotrf);
}

absl::Status CholeskyLower(int64_t n, double* a) {
  WALSH_RETURN_IF_ERROR(CheckSquare("CholeskyLower", n, a));
  if (n == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const cpu::Blas* blas, cpu::OpenBlas());
  return Factor(n, a, blas->dpotrf);
}

absl::Status InvertLower(int64_t n, float* a) {
  WALSH_RETURN_IF_ERROR(CheckSquare("InvertLower", n, a));
  if (n == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const cpu::Blas* blas, cpu::OpenBlas());
  return Invert(n, a, blas->strtri);
}

absl::Status InvertLower(int64_t n, double* a) {
  WALSH_RETURN_IF_ERROR(CheckSquare("InvertLower", n, a));
  if (n == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const cpu::Blas* blas, cpu::OpenBlas());
  return Invert(n, a, blas->dtrtri);
}

}  // namespace walsh::kernels
