#include "worker/gptq/quantize_linear.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/gptq/reference.h"
#include "tests/unit/worker/kernels/kernel_harness.h"
#include "worker/gptq/asymmetric_calibration.h"
#include "worker/gptq/tile.h"
#include "worker/tensor/half.h"

namespace walsh::gptq {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

struct Problem {
  Matrix weights;
  Matrix hessian;
  Matrix cross = {};  // Dᵀ of worker/gptq/asymmetric_calibration.h
};

// Correlated inputs with unequal scales: x = A z, as the activations of a real model look.
Problem RandomProblem(int64_t rows, int64_t in, int64_t n_samples, uint32_t seed,
                      float weight_size = 0.05f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p{Matrix(rows, in), Matrix(in, in), Matrix(in, in)};
  for (float& w : p.weights.span()) w = normal(random) * weight_size;
  std::vector<double> h(static_cast<size_t>(in * in), 0.0), c(h);
  std::mt19937 random_drift(seed + 1);
  std::vector<float> drift(static_cast<size_t>(in));
  std::vector<float> x(static_cast<size_t>(in));
  std::vector<float> size(static_cast<size_t>(in));
  for (float& s : size) s = std::exp(0.5f * normal(random));
  for (int64_t t = 0; t < n_samples; ++t) {
    float shared = 0;
    for (int64_t i = 0; i < in; ++i) {
      shared = 0.7f * shared + normal(random);
      x[i] = size[i] * shared;
    }
    for (int64_t i = 0; i < in; ++i) {
      drift[i] = 0.1f * x[i] + 0.3f * size[i] * normal(random_drift);
    }
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < in; ++j) {
        h[i * in + j] += double{x[i]} * x[j];
        c[i * in + j] += double{x[i]} * drift[j];
      }
    }
  }
  for (int64_t i = 0; i < in * in; ++i) {
    p.hessian.data()[i] = static_cast<float>(h[i]);
    p.cross.data()[i] = static_cast<float>(c[i]);
  }
  return p;
}

QuantizedLinear Quantize(const Problem& problem, const Options& options, int threads = 2) {
  ThreadPool pool(threads);
  auto factor = FactorizeHessian(problem.hessian.Copy(), options, "test");
  EXPECT_OK(factor);
  if (CorrectsAsymmetry(options)) {
    EXPECT_OK(AddAsymmetricCalibration(problem.cross, options.gptaq_alpha,
                                       {kernels::Backend::kCpu, &pool}, *factor));
  }
  auto result = QuantizeLinear("test", problem.weights, *factor, options, pool);
  EXPECT_OK(result);
  return *std::move(result);
}

// What every result must satisfy, whatever the input.
void ExpectSound(const QuantizedLinear& q) {
  const QuantizedMatrix& m = q.matrix;
  ASSERT_EQ(static_cast<int64_t>(m.codes.size()), m.rows * m.cols);
  const auto n_groups = static_cast<size_t>(m.rows * m.groups());
  ASSERT_EQ(m.scales.size(), m.has_codebook() ? 0 : n_groups);
  ASSERT_EQ(m.levels.size(), m.has_codebook() ? 4 * n_groups : 0);
  ASSERT_EQ(m.zeros.size() + m.float_zeros.size(), m.scales.size());
  const int limit = 1 << m.bits;
  for (uint8_t code : m.codes) ASSERT_LT(code, limit);
  for (uint8_t zero : m.zeros) ASSERT_LT(zero, limit);
  for (float scale : m.scales) {
    ASSERT_GE(scale, kScaleMin);
    ASSERT_LE(scale, kScaleMax);
    ASSERT_EQ(HalfToFloat(FloatToHalf(scale)), scale);
  }
  for (float zero : m.float_zeros) ASSERT_EQ(HalfToFloat(FloatToHalf(zero)), zero);
  for (size_t i = 0; i < m.levels.size(); ++i) {
    ASSERT_EQ(HalfToFloat(FloatToHalf(m.levels[i])), m.levels[i]);
    if (i % 4 != 0) {
      ASSERT_LE(m.levels[i - 1], m.levels[i]);
    }
  }
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) {
      const size_t g = static_cast<size_t>(r * m.groups() + c / m.group_size);
      const auto code = static_cast<float>(m.codes[r * m.cols + c]);
      const float expected = m.has_codebook() ? m.levels[4 * g + m.codes[r * m.cols + c]]
                             : m.has_float_zeros()
                                 ? m.scales[g] * (code - m.float_zeros[g])
                                 : m.scales[g] * (code - static_cast<float>(m.zeros[g]));
      ASSERT_EQ(q.dequantized(r, c), expected);
    }
  }
  ASSERT_TRUE(std::isfinite(q.relative_error));
  ASSERT_GE(q.relative_error, 0);
}

// The columns of a group are put together, and keep their order.
TEST(ColumnsByGroupTest, KeepsTheOrderInAGroup) {
  const std::vector<int32_t> steps = {5, 0, 7, 3, 1, 4, 2, 6};
  EXPECT_THAT(ColumnsByGroup(steps, 4), ::testing::ElementsAre(0, 3, 1, 2, 5, 7, 4, 6));
  EXPECT_EQ(ColumnsByGroup(steps, 8), steps);
  EXPECT_THAT(ColumnsByGroup({}, 4), ::testing::IsEmpty());
}

struct ReferenceCase {
  int64_t rows, in, group;
  int bits;
  bool symmetric;
  ColumnOrder order;
  Method method;
  bool mse_clip;
  Grid grid = Grid::kUniform;
  ZeroPoint zero_point = ZeroPoint::kInteger;
};

std::string CaseName(const ::testing::TestParamInfo<ReferenceCase>& info) {
  const ReferenceCase& c = info.param;
  constexpr const char* kMethods[] = {"Rtn", "Gptq", "Gptaq"};
  constexpr const char* kOrders[] = {"Natural", "GroupAware", "ActOrder"};
  return std::string(kMethods[static_cast<int>(c.method)]) + std::to_string(c.rows) + "x" +
         std::to_string(c.in) + "Group" + std::to_string(c.group) + "Bits" +
         std::to_string(c.bits) + (c.symmetric ? "Symmetric" : "") +
         kOrders[static_cast<int>(c.order)] + (c.mse_clip ? "" : "NoClip") +
         (c.grid == Grid::kCodebook ? "Codebook" : "") +
         (c.zero_point == ZeroPoint::kFloat ? "FloatZero" : "");
}

// Whether a group's grid is the reference's, or differs from it by a rounding to half precision.
enum class GridMatch { kEqual, kRounded, kOther };
GridMatch CompareGrid(const QuantizedMatrix& m, const reference::Result& expected, size_t g) {
  constexpr double kHalfStep = 1.1 / 1024;
  const auto compare = [&](double actual, double wanted, double unit) {
    if (actual == wanted) return GridMatch::kEqual;
    return std::abs(actual - wanted) <= kHalfStep * unit ? GridMatch::kRounded : GridMatch::kOther;
  };
  if (m.has_codebook()) {
    GridMatch worst = GridMatch::kEqual;
    for (size_t k = 0; k < 4; ++k) {
      const double wanted = expected.levels[4 * g + k];
      worst = std::max(worst, compare(m.levels[4 * g + k], wanted, std::abs(wanted)));
    }
    return worst;
  }
  const double scale = expected.scales[g], zero = expected.zeros[g];
  const double actual = m.has_float_zeros() ? m.float_zeros[g] : m.zeros[g];
  // A zero is computed with the scale, whose rounding moves it.
  const double zero_unit = m.has_float_zeros() ? 2 * std::max(1.0, std::abs(zero)) : 0.0;
  return std::max(compare(m.scales[g], scale, scale), compare(actual, zero, zero_unit));
}

// The same integers as algorithm 1 in double. Floats may decide a tie the other way: the first step
// at which a row differs must be one, and after it the row is another problem. No more than one row
// in twenty may be excused.
void ExpectLikeReference(const ReferenceCase& c) {
  const Problem problem = RandomProblem(c.rows, c.in, 4 * c.in, static_cast<uint32_t>(c.in));
  Options options;
  options.method = c.method;
  options.bits = c.bits;
  options.group_size = c.group;
  options.symmetric = c.symmetric;
  options.column_order = c.order;
  options.mse_clip = c.mse_clip;
  options.grid = c.grid;
  options.zero_point = c.zero_point;
  const QuantizedLinear actual = Quantize(problem, options);
  ExpectSound(actual);
  const reference::Result expected =
      reference::Quantize(problem.weights, problem.hessian, options, problem.cross);

  constexpr double kTie = 2e-4;
  int64_t excused = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t i = 0; i < c.in; ++i) {
      const int64_t column = expected.order[static_cast<size_t>(i)];
      const size_t g = static_cast<size_t>(r * (c.in / c.group) + column / c.group);
      const size_t index = static_cast<size_t>(r * c.in + column);
      const GridMatch match = CompareGrid(actual.matrix, expected, g);
      if (i % c.group == 0 && match != GridMatch::kEqual) {
        // What is rounded may also round to the neighbouring half.
        ASSERT_TRUE(expected.grid_margin[g] < kTie || match == GridMatch::kRounded)
            << "row " << r << ", group " << column / c.group << ", margin "
            << expected.grid_margin[g];
        ++excused;
        break;
      }
      if (actual.matrix.codes[index] != expected.codes[index]) {
        ASSERT_LT(expected.code_margin[index], kTie)
            << "row " << r << ", column " << column << ": code " << int{actual.matrix.codes[index]}
            << " instead of " << int{expected.codes[index]};
        ++excused;
        break;
      }
    }
  }
  EXPECT_LE(excused * 20, c.rows);
  EXPECT_NEAR(actual.relative_error, expected.error, 2e-3 * expected.error);
}

class ReferenceTest : public ::testing::TestWithParam<ReferenceCase> {};

TEST_P(ReferenceTest, GivesTheSameIntegers) { ExpectLikeReference(GetParam()); }

TEST(QuantizeLinearTest, EveryInstructionSetGivesTheReferencesIntegers) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const kernels::HighwayTarget only(target);
    SCOPED_TRACE(hwy::TargetName(target));
    ExpectLikeReference({40, 192, 64, 3, false, ColumnOrder::kGroupAware, Method::kGptq, true});
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ReferenceTest,
    ::testing::Values(
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kNatural, Method::kGptq, true},
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{40, 64, 32, 2, true, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{40, 192, 64, 3, false, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{40, 192, 64, 3, false, ColumnOrder::kNatural, Method::kGptq, false},
        ReferenceCase{40, 192, 96, 4, false, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{33, 256, 128, 4, false, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{33, 256, 128, 4, true, ColumnOrder::kNatural, Method::kGptq, true},
        ReferenceCase{31, 160, 160, 4, false, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{31, 320, 160, 3, false, ColumnOrder::kNatural, Method::kGptq, true},
        ReferenceCase{31, 137, 137, 8, false, ColumnOrder::kNatural, Method::kGptq, true},
        ReferenceCase{1, 64, 64, 8, true, ColumnOrder::kGroupAware, Method::kGptq, true},
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kActOrder, Method::kGptq, true},
        ReferenceCase{40, 192, 64, 3, true, ColumnOrder::kActOrder, Method::kGptq, false},
        ReferenceCase{33, 320, 160, 4, false, ColumnOrder::kActOrder, Method::kGptq, true},
        ReferenceCase{31, 137, 137, 8, false, ColumnOrder::kActOrder, Method::kGptq, true},
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kNatural, Method::kGptaq, true},
        ReferenceCase{40, 192, 64, 3, false, ColumnOrder::kGroupAware, Method::kGptaq, true},
        ReferenceCase{33, 256, 128, 4, true, ColumnOrder::kActOrder, Method::kGptaq, true},
        ReferenceCase{31, 320, 160, 3, false, ColumnOrder::kNatural, Method::kGptaq, true},
        ReferenceCase{40, 192, 64, 3, false, ColumnOrder::kActOrder, Method::kRtn, true},
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kGroupAware, Method::kGptq, true,
                      Grid::kCodebook},
        ReferenceCase{33, 192, 64, 2, false, ColumnOrder::kNatural, Method::kGptq, true,
                      Grid::kCodebook},
        ReferenceCase{40, 128, 32, 2, false, ColumnOrder::kActOrder, Method::kGptaq, true,
                      Grid::kCodebook},
        ReferenceCase{40, 96, 32, 2, false, ColumnOrder::kNatural, Method::kRtn, true,
                      Grid::kCodebook},
        ReferenceCase{40, 64, 32, 2, false, ColumnOrder::kGroupAware, Method::kGptq, true,
                      Grid::kUniform, ZeroPoint::kFloat},
        ReferenceCase{33, 320, 160, 3, false, ColumnOrder::kNatural, Method::kGptq, true,
                      Grid::kUniform, ZeroPoint::kFloat},
        ReferenceCase{40, 192, 64, 4, false, ColumnOrder::kActOrder, Method::kGptaq, false,
                      Grid::kUniform, ZeroPoint::kFloat},
        ReferenceCase{40, 96, 32, 8, false, ColumnOrder::kNatural, Method::kRtn, true,
                      Grid::kUniform, ZeroPoint::kFloat},
        ReferenceCase{40, 192, 32, 2, false, ColumnOrder::kNatural, Method::kRtn, true},
        ReferenceCase{40, 192, 192, 3, true, ColumnOrder::kGroupAware, Method::kRtn, true},
        ReferenceCase{40, 192, 64, 8, false, ColumnOrder::kNatural, Method::kRtn, false}),
    CaseName);

TEST(QuantizeLinearTest, GptqBeatsRoundToNearestOnItsCalibrationInputs) {
  for (int bits : {2, 3, 4}) {
    const Problem problem = RandomProblem(64, 128, 512, 17);
    Options options;
    options.bits = bits;
    options.group_size = 32;
    const double gptq = Quantize(problem, options).relative_error;
    options.method = Method::kRtn;
    const double rtn = Quantize(problem, options).relative_error;
    EXPECT_LT(gptq, 0.85 * rtn) << bits << " bits";
  }
}

// What the larger grids are for, on one problem.
TEST(QuantizeLinearTest, FloatZerosAndCodebooksLowerTheErrorAtTwoBits) {
  for (Method method : {Method::kRtn, Method::kGptq}) {
    const Problem problem = RandomProblem(64, 128, 512, 19);
    Options options;
    options.method = method;
    options.bits = 2;
    options.group_size = 32;
    const double uniform = Quantize(problem, options).relative_error;
    options.zero_point = ZeroPoint::kFloat;
    const double float_zero = Quantize(problem, options).relative_error;
    options.zero_point = ZeroPoint::kInteger;
    options.grid = Grid::kCodebook;
    const double codebook = Quantize(problem, options).relative_error;
    EXPECT_LT(float_zero, 0.95 * uniform);
    EXPECT_LT(codebook, 0.95 * float_zero);
  }
}

// Ranges without 0, down to groups of one value, which an integer zero cannot follow.
TEST(QuantizeLinearTest, FloatZerosFollowARangeAnywhere) {
  Problem problem = RandomProblem(4, 64, 256, 3);
  for (int64_t c = 0; c < 64; ++c) {
    problem.weights(0, c) = 5 + 0.01f * problem.weights(0, c);
    problem.weights(1, c) = -300;
    problem.weights(2, c) = 0;
    problem.weights(3, c) = 1e-3f * static_cast<float>(1 + c % 2);
  }
  Options options;
  options.method = Method::kRtn;
  options.bits = 2;
  options.group_size = 32;
  options.zero_point = ZeroPoint::kFloat;
  const QuantizedLinear q = Quantize(problem, options);
  ExpectSound(q);
  for (int64_t c = 0; c < 64; ++c) {
    EXPECT_NEAR(q.dequantized(0, c), 5, 5.0 / 1024);
    EXPECT_NEAR(q.dequantized(1, c), -300, 300.0 / 1024);
    EXPECT_EQ(q.dequantized(2, c), 0);
    EXPECT_NEAR(q.dequantized(3, c), problem.weights(3, c), 2e-6);
  }
}

TEST(QuantizeLinearTest, BytesDoNotDependOnThreads) {
  const Problem problem = RandomProblem(100, 256, 600, 4);
  Options options;
  options.bits = 3;
  options.group_size = 64;
  const QuantizedLinear one = Quantize(problem, options, 1);
  for (int threads : {2, 3}) {
    const QuantizedLinear many = Quantize(problem, options, threads);
    EXPECT_EQ(one.matrix.codes, many.matrix.codes);
    EXPECT_EQ(one.matrix.scales, many.matrix.scales);
    EXPECT_EQ(one.matrix.zeros, many.matrix.zeros);
    EXPECT_EQ(one.relative_error, many.relative_error);
  }
}

// Rows are independent: permuting them permutes the result (none depends on its place in a tile).
TEST(QuantizeLinearTest, PermutedRowsGivePermutedCodes) {
  const Problem problem = RandomProblem(45, 128, 300, 8);
  Problem reversed{Matrix(45, 128), problem.hessian.Copy()};
  for (int64_t r = 0; r < 45; ++r) {
    std::copy_n(problem.weights.row(r), 128, reversed.weights.row(44 - r));
  }
  Options options;
  options.bits = 2;
  options.group_size = 32;
  const QuantizedLinear a = Quantize(problem, options), b = Quantize(reversed, options);
  for (int64_t r = 0; r < 45; ++r) {
    for (int64_t c = 0; c < 128; ++c) {
      ASSERT_EQ(a.matrix.codes[r * 128 + c], b.matrix.codes[(44 - r) * 128 + c]);
    }
  }
}

// The columns of each group in another order, as a local Hadamard rotation and GSR with blocks of a
// group differ.
Problem PermutedInsideGroups(const Problem& problem, const std::vector<int64_t>& places) {
  const int64_t in = problem.weights.cols(), group = static_cast<int64_t>(places.size());
  const auto source = [&](int64_t c) { return c / group * group + places[c % group]; };
  Problem p{Matrix(problem.weights.rows(), in), Matrix(in, in), Matrix(in, in)};
  for (int64_t c = 0; c < in; ++c) {
    for (int64_t r = 0; r < p.weights.rows(); ++r) p.weights(r, c) = problem.weights(r, source(c));
    for (int64_t d = 0; d < in; ++d) {
      p.hessian(c, d) = problem.hessian(source(c), source(d));
      p.cross(c, d) = problem.cross(source(c), source(d));
    }
  }
  return p;
}

// Row s of a Walsh matrix is row bitreverse(s ^ (s >> 1)) of the Hadamard matrix of its order, so
// that LH and GSR are one layer in two orders: equal bit for bit under every order of columns that
// goes by the Hessian, and not under the natural one.
TEST(QuantizeLinearTest, LocalHadamardEqualsGsrWhereTheHessianOrdersTheColumns) {
  constexpr int64_t kGroup = 32, kIn = 128, kRows = 48;
  std::vector<int64_t> places;
  for (int64_t s = 0; s < kGroup; ++s) {
    int64_t gray = s ^ (s >> 1), reversed = 0;
    for (int64_t bit = 1; bit < kGroup; bit *= 2, gray /= 2) reversed = 2 * reversed + gray % 2;
    places.push_back(reversed);
  }
  const Problem lh = RandomProblem(kRows, kIn, 600, 77);
  const Problem gsr = PermutedInsideGroups(lh, places);
  for (Method method : {Method::kRtn, Method::kGptq, Method::kGptaq}) {
    for (ColumnOrder order :
         {ColumnOrder::kNatural, ColumnOrder::kGroupAware, ColumnOrder::kActOrder}) {
      if (method == Method::kRtn && order == ColumnOrder::kNatural) continue;  // sums round apart
      Options options;
      options.method = method;
      options.bits = 2;
      options.group_size = kGroup;
      options.column_order = order;
      const QuantizedMatrix a = Quantize(lh, options).matrix, b = Quantize(gsr, options).matrix;
      int64_t differing = 0;
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < kIn; ++c) {
          const int64_t source = c / kGroup * kGroup + places[c % kGroup];
          differing += b.codes[r * kIn + c] != a.codes[r * kIn + source];
        }
      }
      if (order == ColumnOrder::kNatural) {
        EXPECT_GT(differing, kRows * kIn / 20);
      } else {
        EXPECT_EQ(differing, 0) << static_cast<int>(order);
        EXPECT_EQ(a.scales, b.scales);
        EXPECT_EQ(a.zeros, b.zeros);
      }
    }
  }
}

// Static groups: nothing that happens while columns are quantized changes a grid, and groups are
// those of the stored order.
TEST(QuantizeLinearTest, ActOrderLeavesTheGridsOfTheGivenWeights) {
  const Problem problem = RandomProblem(40, 192, 600, 5);
  Options options;
  options.bits = 3;
  options.group_size = 64;
  options.column_order = ColumnOrder::kActOrder;
  const QuantizedLinear gptq = Quantize(problem, options);
  ExpectSound(gptq);
  options.method = Method::kRtn;
  const QuantizedLinear rtn = Quantize(problem, options);
  EXPECT_EQ(gptq.matrix.scales, rtn.matrix.scales);
  EXPECT_EQ(gptq.matrix.zeros, rtn.matrix.zeros);
  EXPECT_LT(gptq.relative_error, 0.85 * rtn.relative_error);
}

TEST(QuantizeLinearTest, ActOrderTakesTheLargestInputsFirst) {
  Matrix h(6, 6);
  const float diagonal[] = {1, 4, 2, 3, 9, 4};
  for (int64_t i = 0; i < 6; ++i) h(i, i) = diagonal[i];
  Options options;
  options.group_size = 2;
  options.column_order = ColumnOrder::kActOrder;
  ASSERT_OK_AND_ASSIGN(const HessianFactor f, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_THAT(f.order, ::testing::ElementsAre(4, 1, 5, 3, 2, 0));
}

// Multiplying the Hessian by a power of two changes nothing at all.
TEST(QuantizeLinearTest, UnitsOfTheHessianDoNotMatter) {
  const Problem problem = RandomProblem(32, 96, 300, 8);
  Problem scaled{problem.weights.Copy(), problem.hessian.Copy()};
  for (float& h : scaled.hessian.span()) h *= 0x1p-20f;
  Options options;
  options.group_size = 32;
  EXPECT_EQ(Quantize(problem, options).matrix.codes, Quantize(scaled, options).matrix.codes);
}

TEST(QuantizeLinearTest, DeadColumnsBecomeZeroAndLeaveTheRestAlone) {
  Problem problem = RandomProblem(40, 64, 256, 21);
  for (int64_t dead : {3, 40}) {
    for (int64_t i = 0; i < 64; ++i) problem.hessian(dead, i) = problem.hessian(i, dead) = 0;
  }
  Options options;
  options.bits = 3;
  options.group_size = 32;
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor,
                       FactorizeHessian(problem.hessian.Copy(), options, "test"));
  EXPECT_EQ(factor.dead_columns, 2);
  const QuantizedLinear q = Quantize(problem, options);
  ExpectSound(q);
  for (int64_t r = 0; r < 40; ++r) {
    EXPECT_EQ(q.dequantized(r, 3), 0.0f);
    EXPECT_EQ(q.dequantized(r, 40), 0.0f);
  }
  const reference::Result expected = reference::Quantize(problem.weights, problem.hessian, options);
  EXPECT_NEAR(q.relative_error, expected.error, 1e-3 * expected.error);
}

TEST(QuantizeLinearTest, SingularHessiansAreFiniteAndNoWorseThanRounding) {
  const Problem base = RandomProblem(40, 64, 256, 31);
  std::vector<std::pair<std::string, Matrix>> hessians;
  hessians.emplace_back("rank 1", Matrix(64, 64));
  hessians.emplace_back("duplicate columns", base.hessian.Copy());
  hessians.emplace_back("fewer samples than inputs", RandomProblem(1, 64, 7, 5).hessian.Copy());
  for (int64_t i = 0; i < 64; ++i) {
    for (int64_t j = 0; j < 64; ++j) {
      hessians[0].second(i, j) = static_cast<float>((1 + i % 5) * (1 + j % 5));
      hessians[1].second(i, j) = base.hessian(i / 2 * 2, j / 2 * 2);
    }
  }
  for (const auto& [name, hessian] : hessians) {
    const Problem problem{base.weights.Copy(), hessian.Copy()};
    Options options;
    options.bits = 3;
    options.group_size = 32;
    const QuantizedLinear gptq = Quantize(problem, options);
    ExpectSound(gptq);
    options.method = Method::kRtn;
    EXPECT_LE(gptq.relative_error, Quantize(problem, options).relative_error) << name;
  }
}

TEST(FactorizeHessianTest, DampingGrowsUntilTheHessianIsPositiveDefinite) {
  Options options;
  options.group_size = 32;
  // One eigenvalue of −3 % of the mean diagonal: 1 % is too little, 10 % is enough.
  Matrix h(32, 32);
  for (int64_t i = 0; i < 32; ++i) h(i, i) = 1;
  h(0, 0) = h(1, 1) = 1;
  h(0, 1) = h(1, 0) = 1.03f;
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_NEAR(factor.damp, 0.1, 1e-12);
  EXPECT_TRUE(factor.fallback.empty());
  EXPECT_FALSE(factor.upper.empty());

  h(0, 1) = h(1, 0) = 1.5f;
  ASSERT_OK_AND_ASSIGN(const HessianFactor indefinite, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_THAT(indefinite.fallback, HasSubstr("not positive definite"));
  EXPECT_TRUE(indefinite.upper.empty());
  const QuantizedLinear q =
      Quantize({RandomProblem(8, 32, 1, 2).weights.Copy(), h.Copy()}, options);
  ExpectSound(q);
  options.method = Method::kRtn;
  EXPECT_EQ(q.matrix.codes,
            Quantize({RandomProblem(8, 32, 1, 2).weights.Copy(), h.Copy()}, options).matrix.codes);
}

// Ten times 2 % is more than 10 %, which is still the last that is tried.
TEST(FactorizeHessianTest, DampingEndsAtTenPercentWhateverItStartsFrom) {
  Matrix h(32, 32);
  for (int64_t i = 0; i < 32; ++i) h(i, i) = 1;
  h(0, 1) = h(1, 0) = 1.03f;
  for (const double damp : {0.0, 0.002, 0.01, 0.02, 0.05}) {
    Options options;
    options.group_size = 32;
    options.damp = damp;
    ASSERT_OK_AND_ASSIGN(const HessianFactor factor, FactorizeHessian(h.Copy(), options, "test"));
    EXPECT_NEAR(factor.damp, damp == 0.05 ? 0.05 : 0.1, 1e-12) << "from " << damp;
    EXPECT_TRUE(factor.fallback.empty()) << "from " << damp;
  }
  // Never less than what was asked for.
  h(0, 1) = h(1, 0) = 1.5f;
  Options options;
  options.group_size = 32;
  options.damp = 0.2;
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_NEAR(factor.damp, 0.2, 1e-12);
  EXPECT_FALSE(factor.fallback.empty());
}

TEST(FactorizeHessianTest, WithoutAnyInputFallsBackToRounding) {
  Options options;
  options.group_size = 32;
  const Problem problem{RandomProblem(8, 64, 1, 2).weights.Copy(), Matrix(64, 64)};
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor,
                       FactorizeHessian(problem.hessian.Copy(), options, "test"));
  EXPECT_THAT(factor.fallback, HasSubstr("no calibration sample"));
  EXPECT_EQ(factor.dead_columns, 0) << "no weight becomes zero";
  const QuantizedLinear q = Quantize(problem, options);
  ExpectSound(q);
  EXPECT_EQ(q.relative_error, 0);
  for (int64_t i = 0; i < problem.weights.size(); ++i) {
    ASSERT_NEAR(q.dequantized.data()[i], problem.weights.data()[i], 0.03);
  }
}

// Uᵀ U (H + λI) = I, with U upper.
TEST(FactorizeHessianTest, UpperFactorOfTheInverse) {
  const Problem problem = RandomProblem(1, 96, 300, 12);
  Options options;
  options.group_size = 32;
  ASSERT_OK_AND_ASSIGN(const HessianFactor f,
                       FactorizeHessian(problem.hessian.Copy(), options, "test"));
  double mean = 0;
  for (int64_t i = 0; i < 96; ++i) mean += problem.hessian(i, i) / 96;
  for (int64_t i = 0; i < 96; ++i) {
    for (int64_t j = 0; j < 96; ++j) {
      if (j < i) {
        ASSERT_EQ(f.upper(i, j), 0.0f);
      }
      double sum = 0;
      for (int64_t k = 0; k < 96; ++k) {
        double inverse = 0;  // (Uᵀ U)[i, k]
        for (int64_t l = 0; l < 96; ++l) inverse += double{f.upper(l, i)} * f.upper(l, k);
        const double h = problem.hessian(f.order[k], f.order[j]) + (k == j ? 0.01 * mean : 0.0);
        sum += inverse * h;
      }
      ASSERT_NEAR(sum, i == j ? 1.0 : 0.0, 2e-3);
    }
  }
}

TEST(FactorizeHessianTest, GroupAwareOrderKeepsGroupsWhole) {
  Matrix h(8, 8);
  const float diagonal[] = {1, 4, 2, 3, 9, 1, 1, 5};
  for (int64_t i = 0; i < 8; ++i) h(i, i) = diagonal[i];
  Options options;
  options.group_size = 2;
  ASSERT_OK_AND_ASSIGN(const HessianFactor f, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_THAT(f.order, ::testing::ElementsAre(4, 5, 7, 6, 1, 0, 3, 2));
  options.column_order = ColumnOrder::kNatural;
  ASSERT_OK_AND_ASSIGN(const HessianFactor natural, FactorizeHessian(h.Copy(), options, "test"));
  EXPECT_THAT(natural.order, ::testing::ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
}

TEST(QuantizeLinearTest, HugeTinyAndOutlyingWeightsStayInRange) {
  for (float size : {1e-38f, 1e-20f, 1e-6f, 1e4f, 1e30f}) {
    Problem problem = RandomProblem(33, 64, 256, 3, size);
    for (Method method : {Method::kRtn, Method::kGptq}) {
      for (const bool has_float_zero : {false, true}) {
        Options options;
        options.method = method;
        options.bits = 2;
        options.group_size = 32;
        if (has_float_zero) {
          options.zero_point = ZeroPoint::kFloat;
        } else {
          options.grid = Grid::kCodebook;
        }
        ExpectSound(Quantize(problem, options));
      }
      for (int bits : {2, 4, 8}) {
        Options options;
        options.method = method;
        options.bits = bits;
        options.group_size = 32;
        options.mse_clip = bits != 8;
        const QuantizedLinear q = Quantize(problem, options);
        ExpectSound(q);
        EXPECT_EQ(q.clamped_groups > 0, size > 1e29f) << size;
        if (method == Method::kRtn && !options.mse_clip && size < 1e29f) {
          for (int64_t i = 0; i < problem.weights.size(); ++i) {
            const float scale = q.matrix.scales[static_cast<size_t>(i / 64 * 2 + i % 64 / 32)];
            // Half a step, and what rounding the scale to half precision moves the ends by.
            const float bound = scale * 0.5f + std::max(scale / 2048, 3e-8f) * 255;
            ASSERT_LE(std::abs(q.dequantized.data()[i] - problem.weights.data()[i]), bound);
          }
        }
      }
    }
  }
  // One outlier per group: the clip search may give it up, but not the others.
  Problem problem = RandomProblem(33, 64, 256, 3);
  for (int64_t r = 0; r < 33; ++r) problem.weights(r, 5) = problem.weights(r, 50) = 10;
  Options options;
  options.group_size = 32;
  ExpectSound(Quantize(problem, options));
}

// Weights that no scale can express, with inputs that pass all error on from column to column: the
// fifth is beyond the largest float. The Hessian is small enough for finite outputs.
TEST(QuantizeLinearTest, AnOverflowWhileUpdatingIsSaidSo) {
  Problem problem{Matrix(8, 64), Matrix(64, 64)};
  for (float& w : problem.weights.span()) w = 1e38f;
  for (float& h : problem.hessian.span()) h = 0x1p-20f;
  Options options;
  options.group_size = 32;
  ThreadPool pool(2);
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor,
                       FactorizeHessian(problem.hessian.Copy(), options, "x"));
  ASSERT_FALSE(factor.upper.empty());
  EXPECT_THAT(
      QuantizeLinear("layers.0.o", problem.weights, factor, options, pool),
      StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("layers.0.o"), HasSubstr("overflow"))));
}

TEST(FactorizeHessianTest, StopsWhenTold) {
  Options options;
  options.group_size = 32;
  EXPECT_THAT(FactorizeHessian(RandomProblem(8, 64, 128, 3).hessian.Copy(), options, "x",
                               [] { return absl::CancelledError("enough"); }),
              HasCode(absl::StatusCode::kCancelled));
}

TEST(QuantizeLinearTest, RefusesWhatIsNotFinite) {
  const float kBad[] = {std::numeric_limits<float>::quiet_NaN(),
                        std::numeric_limits<float>::infinity()};
  for (float bad : kBad) {
    Problem problem = RandomProblem(8, 64, 128, 3);
    Options options;
    options.group_size = 32;
    ThreadPool pool(1);
    ASSERT_OK_AND_ASSIGN(const HessianFactor factor,
                         FactorizeHessian(problem.hessian.Copy(), options, "mlp"));
    problem.weights(5, 61) = bad;
    EXPECT_THAT(QuantizeLinear("layers.0.o", problem.weights, factor, options, pool),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr("layers.0.o"), HasSubstr("[5, 61]"))));
    problem.hessian(2, 7) = bad;
    EXPECT_THAT(FactorizeHessian(problem.hessian.Copy(), options, "layers.1.mlp"),
                StatusIs(absl::StatusCode::kDataLoss,
                         AllOf(HasSubstr("layers.1.mlp"), HasSubstr("[2, 7]"))));
  }
  Problem problem = RandomProblem(8, 64, 128, 3);
  problem.hessian(9, 9) = -1;
  Options options;
  options.group_size = 32;
  EXPECT_THAT(FactorizeHessian(problem.hessian.Copy(), options, "x"),
              HasCode(absl::StatusCode::kDataLoss));
}

TEST(QuantizeLinearTest, RefusesOptionsThatDoNotFit) {
  Options options;
  options.group_size = 32;
  EXPECT_THAT(
      FactorizeHessian(Matrix(137, 137), options, "x"),
      StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("32"), HasSubstr("137"))));
  options.group_size = 0;
  EXPECT_THAT(ValidateOptions(options, 64), HasCode(absl::StatusCode::kInvalidArgument));
  options.group_size = 32;
  for (int bits : {0, 1, 5, 16}) {
    options.bits = bits;
    EXPECT_THAT(ValidateOptions(options, 64),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2, 3, 4 or 8")));
  }
  options.bits = 4;
  for (double damp : {-0.1, 1.5, std::nan("")}) {
    options.damp = damp;
    EXPECT_THAT(ValidateOptions(options, 64), HasCode(absl::StatusCode::kInvalidArgument));
  }
  options.damp = 0.01;
  options.grid = Grid::kCodebook;
  EXPECT_THAT(ValidateOptions(options, 64),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("asked for are 4 bits")));
  options.bits = 2;
  EXPECT_OK(ValidateOptions(options, 64));
  options.zero_point = ZeroPoint::kFloat;
  EXPECT_THAT(ValidateOptions(options, 64),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("codebook")));
  options.grid = Grid::kUniform;
  EXPECT_OK(ValidateOptions(options, 64));
  options.symmetric = true;
  EXPECT_THAT(ValidateOptions(options, 64),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("symmetric")));
  options.symmetric = false;
  options.zero_point = ZeroPoint::kInteger;
  for (double alpha : {-0.1, 1.5, std::nan("")}) {
    options.gptaq_alpha = alpha;
    EXPECT_THAT(ValidateOptions(options, 64),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("alpha")));
  }
  options.gptaq_alpha = 0.25;
  EXPECT_THAT(FactorizeHessian(Matrix(64, 32), options, "x"),
              HasCode(absl::StatusCode::kInvalidArgument));
  ThreadPool pool(1);
  const Problem problem = RandomProblem(8, 64, 128, 3);
  ASSERT_OK_AND_ASSIGN(const HessianFactor factor,
                       FactorizeHessian(problem.hessian.Copy(), options, "x"));
  EXPECT_THAT(QuantizeLinear("x", Matrix(8, 32), factor, options, pool),
              HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::gptq
