#include "worker/gptq/error_propagation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/gptq/quantize_linear.h"

namespace walsh::gptq {
namespace {

constexpr int64_t kIn = 64, kOut = 24, kTokens = 400;

// A linear, the inputs that it has and those that the original model had.
struct Problem {
  Matrix weights{kOut, kIn};
  Matrix x{kTokens, kIn};
  Matrix x_original{kTokens, kIn};
  Matrix hessian{kIn, kIn};
  Matrix cross{kIn, kIn};
};

Problem MakeProblem(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p;
  for (float& w : p.weights.span()) w = 0.1f * normal(random);
  for (int64_t t = 0; t < kTokens; ++t) {
    float shared = 0;
    for (int64_t i = 0; i < kIn; ++i) {
      shared = 0.7f * shared + normal(random);
      p.x_original(t, i) = shared;
      // Quantized layers shrink what they pass on, and add noise.
      p.x(t, i) = 0.9f * shared + 0.3f * normal(random);
    }
  }
  for (int64_t i = 0; i < kIn; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      double h = 0, c = 0;
      for (int64_t t = 0; t < kTokens; ++t) {
        h += double{p.x(t, i)} * p.x(t, j);
        c += double{p.x(t, i)} * (double{p.x_original(t, j)} - p.x(t, j));
      }
      p.hessian(i, j) = static_cast<float>(h);
      p.cross(i, j) = static_cast<float>(c);
    }
  }
  return p;
}

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

// Σ ‖W x_original − V x‖²
double OutputError(const Problem& p, const Matrix& v) {
  double sum = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t o = 0; o < kOut; ++o) {
      double difference = 0;
      for (int64_t i = 0; i < kIn; ++i) {
        difference += double{p.weights(o, i)} * p.x_original(t, i) - double{v(o, i)} * p.x(t, i);
      }
      sum += difference * difference;
    }
  }
  return sum;
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
