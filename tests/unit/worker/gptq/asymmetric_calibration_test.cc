#include "worker/gptq/asymmetric_calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/gptq/drifted_problem.h"
#include "tests/unit/worker/gptq/wide_factor.h"
#include "worker/gptq/quantize_linear.h"

namespace walsh::gptq {
namespace {

using drifted::kIn;
using drifted::kOut;
using drifted::MakeProblem;
using drifted::OutputError;
using drifted::Problem;

Options SmallGroups(ColumnOrder order = ColumnOrder::kGroupAware) {
  return {.method = Method::kGptaq, .bits = 2, .group_size = 32, .column_order = order};
}

HessianFactor Factor(const Problem& p, const Options& options, double alpha,
                     const kernels::Stream& stream = {}) {
  auto factor = FactorizeHessian(p.hessian.Copy(), options, "test");
  EXPECT_OK(factor);
  if (alpha > 0) {
    EXPECT_OK(AddAsymmetricCalibration(p.cross, alpha, stream, *factor));
  }
  return *std::move(factor);
}

// P(i, F) (H_FF + λI) = α D(i, F), the header's definition, in every order.
TEST(AsymmetricCalibrationTest, IsTheRegressionOnTheColumnsLeft) {
  constexpr double kAlpha = 0.25;
  for (ColumnOrder order :
       {ColumnOrder::kNatural, ColumnOrder::kGroupAware, ColumnOrder::kActOrder}) {
    const Problem p = MakeProblem(1);
    const HessianFactor factor = Factor(p, SmallGroups(order), kAlpha);
    ASSERT_EQ(factor.correction.rows(), kIn);
    double lambda = 0;
    for (int64_t i = 0; i < kIn; ++i) lambda += factor.damp * p.hessian(i, i) / kIn;
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j <= i; ++j) ASSERT_EQ(factor.correction(i, j), 0.0f);
      for (int64_t j = i + 1; j < kIn; ++j) {
        double product = 0, scale = 0;
        for (int64_t k = i + 1; k < kIn; ++k) {
          const double h = p.hessian(factor.order[k], factor.order[j]) + (k == j ? lambda : 0.0);
          product += factor.correction(i, k) * h;
          scale += std::abs(factor.correction(i, k) * h);
        }
        const double expected = kAlpha * p.cross(factor.order[j], factor.order[i]);
        ASSERT_LT(std::abs(product - expected), 2e-4 * scale + 1e-3) << i << ", " << j;
      }
    }
  }
}

// What it is for: the quantized linear's outputs come closer to the original's.
TEST(AsymmetricCalibrationTest, QuantizedOutputsComeCloser) {
  const Problem p = MakeProblem(3);
  ThreadPool pool(2);
  std::vector<double> errors;
  for (const double alpha : {0.0, 0.25, 1.0}) {
    const Options options = SmallGroups();
    ASSERT_OK_AND_ASSIGN(
        const QuantizedLinear q,
        QuantizeLinear("test", p.weights, Factor(p, options, alpha), options, pool));
    errors.push_back(OutputError(p, q.dequantized));
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_LT(errors[2], errors[1]);
}

// With inputs that have not changed, as those of the first layer's q, k and v, it is GPTQ.
TEST(AsymmetricCalibrationTest, UnchangedInputsMakeItGptq) {
  Problem p = MakeProblem(4);
  for (float& c : p.cross.span()) c = 0;
  ThreadPool pool(2);
  Options options = SmallGroups();
  ASSERT_OK_AND_ASSIGN(const QuantizedLinear gptaq,
                       QuantizeLinear("test", p.weights, Factor(p, options, 0.25), options, pool));
  options.method = Method::kGptq;
  ASSERT_OK_AND_ASSIGN(const QuantizedLinear gptq,
                       QuantizeLinear("test", p.weights, Factor(p, options, 0), options, pool));
  EXPECT_EQ(gptaq.matrix.codes, gptq.matrix.codes);
  EXPECT_EQ(gptaq.matrix.scales, gptq.matrix.scales);
}

TEST(AsymmetricCalibrationTest, SameBytesWithAnyNumberOfThreads) {
  const Problem p = MakeProblem(5);
  const HessianFactor alone = Factor(p, SmallGroups(), 0.25);
  ThreadPool pool(3);
  const HessianFactor together = Factor(p, SmallGroups(), 0.25, {.pool = &pool});
  for (int64_t i = 0; i < alone.correction.size(); ++i) {
    ASSERT_EQ(alone.correction.data()[i], together.correction.data()[i]);
  }
}

// α · triu(D Uᵀ, 1) · U in double, where more rows are needed than are taken at a time.
TEST(AsymmetricCalibrationTest, RowsAreTakenInParts) {
  constexpr double kAlpha = 0.25;
  constexpr int64_t n = wide::kIn;
  std::mt19937 random(8);
  HessianFactor factor = wide::MakeFactor(random);
  Matrix cross(n, n);
  wide::Randomize(cross, random);
  int n_asked = 0;
  ASSERT_OK(AddAsymmetricCalibration(cross, kAlpha, {}, factor, [&] {
    ++n_asked;
    return absl::OkStatus();
  }));
  EXPECT_EQ(n_asked, 2);
  ASSERT_EQ(factor.correction.rows(), n);
  // Each sum beside that of its terms' sizes, which bounds what rounding makes of it.
  std::vector<double> expected(n), size(n);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(expected.begin(), expected.end(), 0.0);
    std::fill(size.begin(), size.end(), 0.0);
    for (int64_t k = i + 1; k < n; ++k) {
      double right = 0, right_size = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double term = double{cross(factor.order[j], factor.order[i])} * factor.upper(k, j);
        right += term;
        right_size += std::abs(term);
      }
      for (int64_t j = 0; j < n; ++j) {
        expected[j] += kAlpha * right * factor.upper(k, j);
        size[j] += kAlpha * right_size * std::abs(factor.upper(k, j));
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      ASSERT_LE(std::abs(factor.correction(i, j) - expected[j]), 1e-6 * size[j] + 1e-6)
          << i << ", " << j;
    }
  }
}

TEST(AsymmetricCalibrationTest, StopsWhenItsCallerSaysSo) {
  std::mt19937 random(9);
  HessianFactor factor = wide::MakeFactor(random);
  int n_asked = 0;
  EXPECT_THAT(AddAsymmetricCalibration(
                  Matrix(wide::kIn, wide::kIn), 0.25, {}, factor,
                  [&] { return ++n_asked < 2 ? absl::OkStatus() : absl::CancelledError("stop"); }),
              walsh::testing::HasCode(absl::StatusCode::kCancelled));
  EXPECT_TRUE(factor.correction.empty());
}

TEST(AsymmetricCalibrationTest, NothingHappensWithoutAFactor) {
  const Problem p = MakeProblem(6);
  Options rtn = SmallGroups();
  rtn.method = Method::kRtn;
  EXPECT_TRUE(Factor(p, rtn, 0.25).correction.empty());
}

TEST(AsymmetricCalibrationTest, ShapesMustFit) {
  const Problem p = MakeProblem(7);
  HessianFactor factor = Factor(p, SmallGroups(), 0);
  EXPECT_THAT(AddAsymmetricCalibration(Matrix(kIn, kIn / 2), 0.25, {}, factor),
              walsh::testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                       ::testing::HasSubstr("64 x 32")));
}

}  // namespace
}  // namespace walsh::gptq
