#include "worker/gptq/asymmetric_calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/gptq/drifted_problem.h"
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
