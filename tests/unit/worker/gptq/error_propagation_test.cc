#include "worker/gptq/error_propagation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
using drifted::kTokens;
using drifted::MakeProblem;
using drifted::OutputError;
using drifted::Problem;

HessianFactor Factor(const Problem& p, const Options& options) {
  auto factor = FactorizeHessian(p.hessian.Copy(), options, "test");
  EXPECT_OK(factor);
  return *std::move(factor);
}

Matrix Target(const Problem& p, const HessianFactor& factor, double beta,
              const kernels::Stream& stream = {}) {
  Matrix target = p.weights.Copy();
  EXPECT_OK(PropagateError(p.cross, factor, beta, stream, target));
  return target;
}

Options SmallGroups() { return {.bits = 2, .group_size = 32}; }

// The gradient of the header's objective vanishes at β = 1, in any column order.
TEST(ErrorPropagationTest, IsTheMinimumOfItsObjective) {
  for (const ColumnOrder order : {ColumnOrder::kNatural, ColumnOrder::kGroupAware}) {
    const Problem p = MakeProblem(1);
    Options options = SmallGroups();
    options.column_order = order;
    const HessianFactor factor = Factor(p, options);
    const Matrix v = Target(p, factor, 1.0);
    double mean_diagonal = 0;
    for (int64_t i = 0; i < kIn; ++i) mean_diagonal += double{p.hessian(i, i)} / kIn;
    const double lambda = factor.damp * mean_diagonal;
    for (int64_t o = 0; o < kOut; ++o) {
      for (int64_t j = 0; j < kIn; ++j) {
        double gradient = lambda * (double{v(o, j)} - p.weights(o, j));
        double scale = 0;
        for (int64_t t = 0; t < kTokens; ++t) {
          double residual = 0;
          for (int64_t i = 0; i < kIn; ++i) {
            residual += double{v(o, i)} * p.x(t, i) - double{p.weights(o, i)} * p.x_original(t, i);
          }
          gradient += residual * p.x(t, j);
          scale += std::abs(residual * p.x(t, j));
        }
        EXPECT_LT(std::abs(gradient), 2e-4 * scale) << "row " << o << ", column " << j;
      }
    }
  }
}

TEST(ErrorPropagationTest, BetaScalesTheStep) {
  const Problem p = MakeProblem(2);
  const HessianFactor factor = Factor(p, SmallGroups());
  const Matrix half = Target(p, factor, 0.5);
  const Matrix whole = Target(p, factor, 1.0);
  for (int64_t i = 0; i < half.size(); ++i) {
    const float w = p.weights.data()[i];
    EXPECT_NEAR(half.data()[i] - w, 0.5 * (whole.data()[i] - w), 1e-6);
  }
}

// What it is for: the quantized linear's outputs come closer to the original's.
TEST(ErrorPropagationTest, QuantizedOutputsComeCloser) {
  const Problem p = MakeProblem(3);
  const Options options = SmallGroups();
  const HessianFactor factor = Factor(p, options);
  ThreadPool pool(2);
  std::vector<double> errors;
  for (const double beta : {0.0, 0.5, 1.0}) {
    const Matrix target = Target(p, factor, beta);
    ASSERT_OK_AND_ASSIGN(const QuantizedLinear q,
                         QuantizeLinear("test", target, factor, options, pool));
    errors.push_back(OutputError(p, q.dequantized));
  }
  EXPECT_LT(errors[1], errors[0]);
  EXPECT_LT(errors[2], errors[1]);
}

TEST(ErrorPropagationTest, SameBytesWithAnyNumberOfThreads) {
  const Problem p = MakeProblem(4);
  const HessianFactor factor = Factor(p, SmallGroups());
  const Matrix alone = Target(p, factor, 0.5);
  ThreadPool pool(3);
  const Matrix together = Target(p, factor, 0.5, {.pool = &pool});
  for (int64_t i = 0; i < alone.size(); ++i) ASSERT_EQ(alone.data()[i], together.data()[i]);
}

// W += β W D Uᵀ U in double, where more rows and columns are needed than are taken at a time.
TEST(ErrorPropagationTest, RowsAreTakenInParts) {
  constexpr double kBeta = 0.5;
  constexpr int64_t n = wide::kIn;
  std::mt19937 random(7);
  const HessianFactor factor = wide::MakeFactor(random);
  Matrix cross(n, n), weights(wide::kOut, n);
  wide::Randomize(cross, random);
  wide::Randomize(weights, random);
  const Matrix before = weights.Copy();
  int n_asked = 0;
  ASSERT_OK(PropagateError(cross, factor, kBeta, {}, weights, [&] {
    ++n_asked;
    return absl::OkStatus();
  }));
  EXPECT_EQ(n_asked, 2);
  // Each sum beside that of its terms' sizes, which bounds what rounding makes of it.
  std::vector<double> wd(n), wd_size(n), right(n), right_size(n);
  for (int64_t o = 0; o < wide::kOut; ++o) {
    for (int64_t i = 0; i < n; ++i) {
      wd[i] = wd_size[i] = 0;
      for (int64_t k = 0; k < n; ++k) {
        const double term = double{before(o, k)} * cross(factor.order[i], k);
        wd[i] += term;
        wd_size[i] += std::abs(term);
      }
    }
    for (int64_t k = 0; k < n; ++k) {
      right[k] = right_size[k] = 0;
      for (int64_t i = k; i < n; ++i) {
        right[k] += wd[i] * factor.upper(k, i);
        right_size[k] += wd_size[i] * std::abs(factor.upper(k, i));
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      double step = 0, size = 0;
      for (int64_t k = 0; k <= j; ++k) {
        step += kBeta * right[k] * factor.upper(k, j);
        size += kBeta * right_size[k] * std::abs(factor.upper(k, j));
      }
      const int32_t column = factor.order[j];
      ASSERT_LE(std::abs(weights(o, column) - before(o, column) - step), 1e-6 * size + 1e-6)
          << o << ", " << j;
    }
  }
}

TEST(ErrorPropagationTest, StopsWhenItsCallerSaysSo) {
  std::mt19937 random(8);
  const HessianFactor factor = wide::MakeFactor(random);
  Matrix weights(wide::kOut, wide::kIn);
  EXPECT_THAT(PropagateError(Matrix(wide::kIn, wide::kIn), factor, 0.5, {}, weights,
                             [] { return absl::CancelledError("stop"); }),
              walsh::testing::HasCode(absl::StatusCode::kCancelled));
}

TEST(ErrorPropagationTest, NothingHappensWithoutAFactor) {
  const Problem p = MakeProblem(5);
  Options rtn = SmallGroups();
  rtn.method = Method::kRtn;
  const Matrix target = Target(p, Factor(p, rtn), 1.0);
  for (int64_t i = 0; i < target.size(); ++i) ASSERT_EQ(target.data()[i], p.weights.data()[i]);
}

TEST(ErrorPropagationTest, ShapesMustFit) {
  const Problem p = MakeProblem(6);
  Matrix narrow(kOut, kIn / 2);
  EXPECT_THAT(PropagateError(p.cross, Factor(p, SmallGroups()), 1.0, {}, narrow),
              walsh::testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                       ::testing::HasSubstr("32 inputs")));
}

}  // namespace
}  // namespace walsh::gptq
