// A linear on the device, from its Hessian to its codes.
//
// Goal:   the operations together do what the methods say; above all GPTAQ's correction.
// Method: P against its formula in double; codes and error against the oracle of the CPU's tests,
//         which shares no step with either (tests/unit/worker/gptq/reference.h).
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <ostream>
#include <random>
#include <vector>

#include "tests/gpu/gpu_fixture.h"
#include "tests/unit/worker/gptq/reference.h"
#include "worker/gptq/hessian.h"
#include "worker/gptq/options.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/tensor/matrix.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

class CorrectAsymmetryGpuTest : public GpuTest, public ::testing::WithParamInterface<int64_t> {};

TEST_P(CorrectAsymmetryGpuTest, AgreesWithTheFormula) {
  const int64_t n = GetParam();
  const double alpha = 0.25;
  const float size = 1.0f / std::sqrt(static_cast<float>(n));
  const std::vector<float> cross = RandomNormal(n * n, 1, size);
  std::vector<float> u = RandomNormal(n * n, 2, size);
  for (int64_t i = 0; i < n; ++i) {
    // What stands below the diagonal must not be read as a part of U.
    for (int64_t j = 0; j < i; ++j) u[i * n + j] = std::numeric_limits<float>::quiet_NaN();
    u[i * n + i] = 1.0f + std::abs(u[i * n + i]);
  }
  std::vector<int32_t> perm(static_cast<size_t>(n));
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), std::mt19937(3));

  std::vector<double> expected(static_cast<size_t>(n * n), 0.0);
  std::vector<double> row(static_cast<size_t>(n));  // of triu(D Uᵀ, 1)
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i + 1; j < n; ++j) {
      row[j] = 0;
      for (int64_t k = j; k < n; ++k) {
        row[j] += static_cast<double>(cross[perm[k] * n + perm[i]]) * u[j * n + k];
      }
    }
    for (int64_t k = i + 1; k < n; ++k) {
      for (int64_t j = k; j < n; ++j) expected[i * n + j] += alpha * row[k] * u[k * n + j];
    }
  }

  auto device_cross = Upload(cross);
  const auto device_u = Upload(u);
  const auto device_perm = Upload(perm);
  auto correction = Poisoned<float>(n * n);
  ASSERT_OK(CorrectAsymmetry(context(), {.cols = n,
                                         .cross = device_cross.data(),
                                         .u = device_u.data(),
                                         .perm = device_perm.data(),
                                         .alpha = alpha,
                                         .correction = correction.data()}));
  std::vector<float> actual = Download(correction);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) actual[i * n + j] = 0;  // unspecified
  }
  EXPECT_LE(NormalizedSquaredError(actual, expected), 1e-11);  // fp32; TF32 leaves some 1e-7
}
// Around a tile, and around a strip of 512 rows.
INSTANTIATE_TEST_SUITE_P(Sizes, CorrectAsymmetryGpuTest,
                         ::testing::Values(1, 2, 31, 32, 33, 160, 511, 512, 513, 640));

using CorrectAsymmetrySizesGpuTest = GpuTest;

TEST_F(CorrectAsymmetrySizesGpuTest, EmptyAndNegative) {
  EXPECT_OK(CorrectAsymmetry(context(), {.cols = 0}));
  EXPECT_THAT(CorrectAsymmetry(context(), {.cols = -1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1 columns")));
}

struct Case {
  int64_t rows = 0;
  int64_t cols = 0;
  gptq::Options options;
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.rows << "x" << c.cols << " bits " << c.options.bits << " group " << c.options.group_size
       << " method " << static_cast<int>(c.options.method) << " order "
       << static_cast<int>(c.options.column_order) << (c.options.symmetric ? " symmetric" : "")
       << (c.options.mse_clip ? " clip" : "");
}

// Inputs that are correlated and of unequal sizes, as activations are, and have drifted from those
// of the original model.
struct Problem {
  Problem(int64_t rows, int64_t cols)
      : weights(rows, cols), hessian(cols, cols), cross(cols, cols) {
    std::mt19937 random(17);
    std::normal_distribution<float> normal;
    for (float& w : weights.span()) w = 0.05f * normal(random);
    std::vector<float> size(static_cast<size_t>(cols)), x(size), drift(size);
    for (float& s : size) s = std::exp(0.5f * normal(random));
    std::vector<double> h(static_cast<size_t>(cols * cols), 0.0), c(h);
    for (int64_t t = 0; t < 4 * cols; ++t) {
      float shared = 0;
      for (int64_t i = 0; i < cols; ++i) {
        shared = 0.7f * shared + normal(random);
        x[i] = size[i] * shared;
        drift[i] = 0.2f * x[i] + 0.5f * size[i] * normal(random);
      }
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          h[i * cols + j] += static_cast<double>(x[i]) * x[j];
          c[i * cols + j] += static_cast<double>(x[i]) * drift[j];
        }
      }
    }
    std::copy(h.begin(), h.end(), hessian.data());
    std::copy(c.begin(), c.end(), cross.data());
  }

  Matrix weights, hessian, cross;
};

std::vector<float> Values(const Matrix& m) { return {m.data(), m.data() + m.size()}; }

class QuantizeLinearGpuTest : public GpuTest, public ::testing::WithParamInterface<Case> {
 protected:
  // What the codes stand for, [rows, cols].
  std::vector<double> Quantize(const Problem& p, const gptq::Options& options) {
    const int64_t rows = p.weights.rows(), cols = p.weights.cols();
    const int64_t groups = cols / options.group_size;
    std::vector<float> diagonal(static_cast<size_t>(cols));
    double mean = 0;
    for (int64_t i = 0; i < cols; ++i) {
      diagonal[i] = p.hessian(i, i);
      mean += static_cast<double>(p.hessian(i, i)) / static_cast<double>(cols);
    }
    const std::vector<int32_t> steps = gptq::ColumnSteps(diagonal, options);
    const auto perm = Upload(steps);
    DeviceBuffer<int32_t> static_groups;
    if (gptq::HasStaticGroups(options)) {
      static_groups = Upload(gptq::ColumnsByGroup(steps, options.group_size));
    }
    const auto h = Upload(Values(p.hessian));
    const auto add =
        Upload(std::vector<float>(diagonal.size(), static_cast<float>(options.damp * mean)));
    const auto w = Upload(Values(p.weights));
    auto u = Poisoned<float>(cols * cols);
    auto cross = Upload(Values(p.cross));
    DeviceBuffer<float> correction;
    EXPECT_OK(FactorHessian(context(), {.dim = cols,
                                        .h = h.data(),
                                        .perm = perm.data(),
                                        .diagonal_add = add.data(),
                                        .u = u.data()}));
    if (gptq::CorrectsAsymmetry(options)) {
      correction = Poisoned<float>(cols * cols);
      EXPECT_OK(CorrectAsymmetry(context(), {.cols = cols,
                                             .cross = cross.data(),
                                             .u = u.data(),
                                             .perm = perm.data(),
                                             .alpha = options.gptaq_alpha,
                                             .correction = correction.data()}));
    }
    const bool rounds = options.method == gptq::Method::kRtn;
    auto codes = Poisoned<uint8_t>(rows * cols);
    auto scales = Poisoned<float>(rows * groups);
    auto zeros = Poisoned<uint8_t>(rows * groups);
    EXPECT_OK(QuantizeColumns(context(), {.rows = rows,
                                          .cols = cols,
                                          .w = w.data(),
                                          .u = rounds ? nullptr : u.data(),
                                          .correction = correction.data(),
                                          .perm = perm.data(),
                                          .static_groups = static_groups.data(),
                                          .bits = options.bits,
                                          .group_size = options.group_size,
                                          .symmetric = options.symmetric,
                                          .mse_clip = options.mse_clip,
                                          .codes = codes.data(),
                                          .scales = scales.data(),
                                          .zeros = zeros.data()}));
    const std::vector<uint8_t> host_codes = Download(codes), host_zeros = Download(zeros);
    const std::vector<float> host_scales = Download(scales);
    std::vector<double> dequantized(host_codes.size());
    for (int64_t i = 0; i < rows * cols; ++i) {
      EXPECT_LT(host_codes[i], 1 << options.bits);
      const int64_t g = i / cols * groups + i % cols / options.group_size;
      dequantized[i] = static_cast<double>(host_scales[g]) * (host_codes[i] - host_zeros[g]);
    }
    return dequantized;
  }

  static std::vector<double> Dequantized(const Problem& p, const gptq::Options& options,
                                         const gptq::reference::Result& result) {
    const int64_t cols = p.weights.cols();
    const int64_t groups = cols / options.group_size;
    std::vector<double> dequantized(result.codes.size());
    for (int64_t i = 0; i < p.weights.size(); ++i) {
      const int64_t g = i / cols * groups + i % cols / options.group_size;
      dequantized[i] = result.scales[g] * (result.codes[i] - result.zeros[g]);
    }
    return dequantized;
  }

  // tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)
  static double RelativeError(const Problem& p, const std::vector<double>& dequantized) {
    const int64_t cols = p.weights.cols();
    double error = 0, output = 0;
    for (int64_t r = 0; r < p.weights.rows(); ++r) {
      for (int64_t i = 0; i < cols; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          const double h = p.hessian(i, j), wi = p.weights(r, i), wj = p.weights(r, j);
          error += (wi - dequantized[r * cols + i]) * h * (wj - dequantized[r * cols + j]);
          output += wi * h * wj;
        }
      }
    }
    return error / output;
  }

  // The share of weights that are the same but for the rounding of a scale.
  static double Agreement(const std::vector<double>& a, const std::vector<double>& b) {
    size_t n_equal = 0;
    for (size_t i = 0; i < a.size(); ++i) n_equal += std::abs(a[i] - b[i]) < 1e-4 ? 1 : 0;
    return static_cast<double>(n_equal) / static_cast<double>(a.size());
  }
};

// Rounding differs from double's near ties, so that single codes may differ and then move their
// successors; GPTQ where GPTAQ is asked for is far away.
TEST_P(QuantizeLinearGpuTest, AgreesWithTheReference) {
  const auto& [rows, cols, options] = GetParam();
  const Problem p(rows, cols);
  const gptq::reference::Result expected =
      gptq::reference::Quantize(p.weights, p.hessian, options, p.cross);
  const std::vector<double> wanted = Dequantized(p, options, expected);
  const std::vector<double> actual = Quantize(p, options);
  EXPECT_GE(Agreement(actual, wanted), 0.97);
  EXPECT_NEAR(RelativeError(p, actual) / expected.error, 1.0, 0.01);
  EXPECT_EQ(Quantize(p, options), actual) << "a second time";
  if (options.method != gptq::Method::kGptaq) return;
  gptq::Options plain = options;
  plain.method = gptq::Method::kGptq;
  EXPECT_LT(Agreement(Quantize(p, plain), wanted), 0.9);
}

gptq::Options Gptaq(int bits, int64_t group, gptq::ColumnOrder order, double alpha = 0.25) {
  gptq::Options options;
  options.method = gptq::Method::kGptaq;
  options.bits = bits;
  options.group_size = group;
  options.column_order = order;
  options.gptaq_alpha = alpha;
  return options;
}
gptq::Options Symmetric(gptq::Options options) {
  options.symmetric = true;
  options.mse_clip = false;
  return options;
}
constexpr auto kNatural = gptq::ColumnOrder::kNatural;
constexpr auto kGroupAware = gptq::ColumnOrder::kGroupAware;
// One block and several, whole and cut; groups inside a block, as wide as one, and wider.
INSTANTIATE_TEST_SUITE_P(Gptaq, QuantizeLinearGpuTest,
                         ::testing::Values(Case{1, 32, Gptaq(4, 32, kNatural, 1.0)},
                                           Case{33, 128, Gptaq(4, 128, kNatural)},
                                           Case{17, 96, Gptaq(4, 32, kGroupAware)},
                                           Case{40, 256, Gptaq(3, 64, kGroupAware)},
                                           Case{16, 288, Gptaq(8, 288, kGroupAware)},
                                           Case{24, 352, Gptaq(2, 32, kGroupAware)},
                                           Case{31, 384, Gptaq(4, 128, kGroupAware, 1.0)},
                                           Case{8, 512, Gptaq(4, 256, kNatural)},
                                           Case{37, 160, Symmetric(Gptaq(4, 32, kGroupAware))}));

gptq::Options ActOrder(gptq::Options options, gptq::Method method = gptq::Method::kGptaq) {
  options.column_order = gptq::ColumnOrder::kActOrder;
  options.method = method;
  return options;
}
// Groups scattered over all blocks, narrower and wider than one, and in one block.
INSTANTIATE_TEST_SUITE_P(
    ActOrder, QuantizeLinearGpuTest,
    ::testing::Values(Case{33, 128, ActOrder(Gptaq(4, 32, kNatural), gptq::Method::kGptq)},
                      Case{17, 352, ActOrder(Gptaq(3, 32, kNatural), gptq::Method::kGptq)},
                      Case{24, 384, ActOrder(Gptaq(4, 128, kNatural))},
                      Case{5, 512, ActOrder(Gptaq(4, 256, kNatural))},
                      Case{9, 288, ActOrder(Symmetric(Gptaq(4, 288, kNatural)))},
                      Case{40, 192, ActOrder(Gptaq(4, 64, kNatural), gptq::Method::kRtn)}));

// Both sizes of a CTA: what a row becomes does not depend on the rows beside it.
TEST_F(QuantizeLinearGpuTest, ManyRowsAreQuantizedAsFewAre) {
  const int64_t cols = 160, few = 20;
  const Problem p(16 * context().properties().multiProcessorCount + 37, cols);
  Problem first_rows(few, cols);
  std::copy_n(p.weights.data(), few * cols, first_rows.weights.data());
  std::copy_n(p.hessian.data(), cols * cols, first_rows.hessian.data());
  std::copy_n(p.cross.data(), cols * cols, first_rows.cross.data());
  for (const gptq::Options& options : {Gptaq(4, 32, kGroupAware), ActOrder(Gptaq(4, 32, kNatural)),
                                       ActOrder(Gptaq(4, 32, kNatural), gptq::Method::kGptq)}) {
    std::vector<double> many = Quantize(p, options);
    many.resize(static_cast<size_t>(few * cols));
    // The trailing product of another number of rows may be summed in another order.
    EXPECT_GE(Agreement(Quantize(first_rows, options), many), 0.99);
  }
}

}  // namespace
}  // namespace walsh::kernels::cuda
