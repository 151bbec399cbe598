// The error-propagated target on the device, against its formula in double and against the CPU's.
#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/gpu/gpu_fixture.h"
#include "worker/gptq/error_propagation.h"
#include "worker/kernels/cuda/gptq.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr double kLimit = 1e-11;  // NMSE of fp32; TF32 leaves some 1e-7

struct Problem {
  int64_t rows = 0;
  int64_t cols = 0;
  bool permute = true;
};
std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << p.rows << "x" << p.cols << (p.permute ? " permuted" : "");
}

class PropagateErrorGpuTest : public GpuTest, public ::testing::WithParamInterface<Problem> {};

TEST_P(PropagateErrorGpuTest, AgreesWithTheFormulaAndTheCpu) {
  const auto [rows, cols, permute] = GetParam();
  const double beta = 0.5;
  const std::vector<float> w = RandomNormal(rows * cols, 1);
  const std::vector<float> cross =
      RandomNormal(cols * cols, 2, 1.0f / std::sqrt(static_cast<float>(cols)));
  std::vector<float> u = RandomNormal(cols * cols, 3, 1.0f / std::sqrt(static_cast<float>(cols)));
  std::vector<float> u_with_poison = u;
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      u[i * cols + j] = 0;
      // What stands below the diagonal must not be read as a part of U.
      u_with_poison[i * cols + j] = std::numeric_limits<float>::quiet_NaN();
    }
    u[i * cols + i] = u_with_poison[i * cols + i] = 1.0f + std::abs(u[i * cols + i]);
  }
  std::vector<int32_t> perm(static_cast<size_t>(cols));
  std::iota(perm.begin(), perm.end(), 0);
  if (permute) std::shuffle(perm.begin(), perm.end(), std::mt19937(4));

  // W + β W D Pᵀ Uᵀ U P, with D[k, i] = cross[i, k].
  std::vector<double> inverse(static_cast<size_t>(cols * cols), 0.0);
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < cols; ++k) {
        sum += static_cast<double>(u[k * cols + i]) * u[k * cols + j];
      }
      inverse[perm[i] * cols + perm[j]] = sum;
    }
  }
  std::vector<double> expected(w.begin(), w.end());
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> wd(static_cast<size_t>(cols), 0.0);
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t k = 0; k < cols; ++k) {
        wd[i] += static_cast<double>(w[r * cols + k]) * cross[i * cols + k];
      }
    }
    for (int64_t j = 0; j < cols; ++j) {
      double step = 0;
      for (int64_t i = 0; i < cols; ++i) step += wd[i] * inverse[i * cols + j];
      expected[r * cols + j] += beta * step;
    }
  }

  auto device_w = Upload(w);
  auto device_cross = Upload(cross);
  const auto device_u = Upload(u_with_poison);
  const auto device_perm = Upload(perm);
  ResetDeviceMemoryPeak();
  const int64_t before = DeviceMemoryUse().bytes_now;
  ASSERT_OK(PropagateError(context(), {.rows = rows,
                                       .cols = cols,
                                       .w = device_w.data(),
                                       .cross = device_cross.data(),
                                       .u = device_u.data(),
                                       .perm = device_perm.data(),
                                       .beta = beta}));
  EXPECT_LE(DeviceMemoryUse().bytes_peak - before,
            (3 * rows + 2 * cols) * cols * static_cast<int64_t>(sizeof(float)));
  const std::vector<float> actual = Download(device_w);
  EXPECT_LE(NormalizedSquaredError(actual, expected), kLimit);

  gptq::HessianFactor factor;
  factor.order = perm;
  factor.upper = Matrix(cols, cols);
  std::copy(u.begin(), u.end(), factor.upper.data());
  Matrix cpu_cross(cols, cols);
  std::copy(cross.begin(), cross.end(), cpu_cross.data());
  Matrix cpu_w(rows, cols);
  std::copy(w.begin(), w.end(), cpu_w.data());
  ASSERT_OK(gptq::PropagateError(cpu_cross, factor, beta, {}, cpu_w));
  const auto cpu = cpu_w.span();
  EXPECT_LE(NormalizedSquaredError(actual, std::vector<float>(cpu.begin(), cpu.end())), kLimit);
}

// Both ways to multiply, and the border between them at rows = 2 · cols.
INSTANTIATE_TEST_SUITE_P(
    Shapes, PropagateErrorGpuTest,
    ::testing::Values(Problem{.rows = 1, .cols = 1}, Problem{.rows = 2, .cols = 1},
                      Problem{.rows = 3, .cols = 5}, Problem{.rows = 33, .cols = 7},
                      Problem{.rows = 63, .cols = 32}, Problem{.rows = 64, .cols = 32},
                      Problem{.rows = 17, .cols = 64, .permute = false},
                      Problem{.rows = 130, .cols = 64, .permute = false},
                      Problem{.rows = 5, .cols = 288}, Problem{.rows = 577, .cols = 257}));

using PropagateErrorSizesGpuTest = GpuTest;

TEST_F(PropagateErrorSizesGpuTest, EmptyAndNegative) {
  EXPECT_OK(PropagateError(context(), {.rows = 0, .cols = 8}));
  EXPECT_OK(PropagateError(context(), {.rows = 8, .cols = 0}));
  EXPECT_THAT(PropagateError(context(), {.rows = -1, .cols = 8}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[-1, 8]")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
