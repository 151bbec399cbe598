#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/unit/worker/kernels/kernel_harness.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/cpu_features.h"

namespace walsh::kernels {
namespace {

using testing::HasCode;
using testing::StatusIs;

// A well conditioned symmetric positive definite matrix: X Xᵀ / n + 1.
template <typename T>
std::vector<T> PositiveDefinite(int64_t n) {
  const auto x = testing::RandomFloats(n * n, 1);
  std::vector<T> a(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = 0; k < n; ++k) {
        sum += static_cast<double>(x[i * n + k]) * x[j * n + k] / static_cast<double>(n);
      }
      a[i * n + j] = static_cast<T>(sum);
    }
  }
  return a;
}

template <typename T>
class FactorizeTest : public ::testing::Test {
 protected:
  static constexpr double kTolerance = std::is_same_v<T, float> ? 2e-5 : 1e-13;
};
using Floats = ::testing::Types<float, double>;
TYPED_TEST_SUITE(FactorizeTest, Floats);

TYPED_TEST(FactorizeTest, FactorTimesItsTransposeIsTheMatrix) {
  for (const int64_t n : {1, 2, 3, 17, 64, 172, 300}) {
    const auto a = PositiveDefinite<TypeParam>(n);
    auto l = a;
    ASSERT_OK(CholeskyLower(n, l.data()));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        if (j > i) {
          ASSERT_EQ(l[i * n + j], 0);
        }
        double sum = 0;
        for (int64_t k = 0; k <= std::min(i, j); ++k) {
          sum += static_cast<double>(l[i * n + k]) * static_cast<double>(l[j * n + k]);
        }
        ASSERT_NEAR(sum, static_cast<double>(a[i * n + j]), this->kTolerance)
            << i << ", " << j << " of " << n;
      }
    }
  }
}

TYPED_TEST(FactorizeTest, InverseTimesTheFactorIsTheIdentity) {
  for (const int64_t n : {1, 2, 17, 172, 300}) {
    auto l = PositiveDefinite<TypeParam>(n);
    ASSERT_OK(CholeskyLower(n, l.data()));
    auto inverse = l;
    ASSERT_OK(InvertLower(n, inverse.data()));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t k = j; k <= i; ++k) {
          sum += static_cast<double>(inverse[i * n + k]) * static_cast<double>(l[k * n + j]);
        }
        ASSERT_NEAR(sum, i == j ? 1.0 : 0.0, this->kTolerance) << i << ", " << j << " of " << n;
      }
    }
  }
}

TYPED_TEST(FactorizeTest, RefusesWhatIsNotPositiveDefinite) {
  std::vector<TypeParam> indefinite = {1, 2, 2, 1};
  EXPECT_THAT(CholeskyLower(2, indefinite.data()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       ::testing::HasSubstr("not positive definite")));
  std::vector<TypeParam> with_nan = {1, 0, 0, std::numeric_limits<TypeParam>::quiet_NaN()};
  EXPECT_THAT(CholeskyLower(2, with_nan.data()), HasCode(absl::StatusCode::kFailedPrecondition));
  std::vector<TypeParam> singular = {1, 0, 3, 0};
  EXPECT_THAT(InvertLower(2, singular.data()),
              StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::HasSubstr("element 1")));
}

TYPED_TEST(FactorizeTest, RefusesBadArguments) {
  TypeParam* none = nullptr;
  EXPECT_OK(CholeskyLower(0, none));
  EXPECT_THAT(CholeskyLower(2, none), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(InvertLower(-1, none), HasCode(absl::StatusCode::kInvalidArgument));
}

// The trap that this guards against: OpenBLAS taking a new CPU for a Prescott.
TEST(BlasTest, UsesTheKernelsOfThisCpu) {
  ASSERT_OK_AND_ASSIGN(const cpu::Blas* blas, cpu::OpenBlas());
  const cpu::CpuFeatures& features = cpu::GetCpuFeatures();
  if (features.avx2_fma) {
    EXPECT_NE(blas->core, "Prescott");
    EXPECT_NE(blas->core, "Core2");
  }
  EXPECT_THAT(DescribeCpuBackend(), ::testing::HasSubstr(blas->core));
}

}  // namespace
}  // namespace walsh::kernels
