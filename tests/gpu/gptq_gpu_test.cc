// GPTQ on the device against the algorithm written out in double.
#include <algorithm>
#include <numeric>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

struct Problem {
  int64_t rows = 0;
  int64_t cols = 0;
  int bits = 4;
  int64_t group_size = 128;
  bool symmetric = false;
  bool mse_clip = true;
  bool permute = false;
};

std::ostream& operator<<(std::ostream& out, const Problem& p) {
  return out << p.rows << "x" << p.cols << " bits " << p.bits << " group " << p.group_size
             << (p.symmetric ? " symmetric" : "") << (p.mse_clip ? " clip" : "")
             << (p.permute ? " permuted" : "");
}

// Groups move as a whole and columns inside their group, as in group-aware ordering.
std::vector<int32_t> MakePermutation(const Problem& p, uint32_t seed) {
  std::vector<int32_t> perm(static_cast<size_t>(p.cols));
  std::iota(perm.begin(), perm.end(), 0);
  if (!p.permute) return perm;
  std::mt19937 generator(seed);
  std::vector<int64_t> groups(static_cast<size_t>(p.cols / p.group_size));
  std::iota(groups.begin(), groups.end(), 0);
  std::shuffle(groups.begin(), groups.end(), generator);
  size_t position = 0;
  for (const int64_t g : groups) {
    const auto begin = static_cast<int64_t>(position);
    for (int64_t c = 0; c < p.group_size; ++c) {
      perm[position++] = static_cast<int32_t>(g * p.group_size + c);
    }
    std::shuffle(perm.begin() + begin, perm.begin() + begin + p.group_size, generator);
  }
  return perm;
}

struct Grid {
  double scale;
  double zero;
};

Grid GridFromRange(double low, double high, double max_code, bool symmetric) {
  if (symmetric) {
    const double reach = std::max(-low, high);
    low = -reach;
    high = reach;
  }
  const double scale =
      static_cast<double>(HalfToFloat(FloatToHalf(static_cast<float>((high - low) / max_code))));
  if (!(scale > 0)) return {1.0, symmetric ? (max_code + 1) / 2 : 0.0};
  const double zero =
      symmetric ? (max_code + 1) / 2 : std::clamp(std::nearbyint(-low / scale), 0.0, max_code);
  return {scale, zero};
}
double ToCode(double w, const Grid& g, double max_code) {
  return std::clamp(std::nearbyint(w / g.scale) + g.zero, 0.0, max_code);
}
Grid FindGrid(const std::vector<double>& values, double max_code, const Problem& p) {
  double low = 0;
  double high = 0;
  for (const double v : values) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  Grid best = GridFromRange(low, high, max_code, p.symmetric);
  double best_error = INFINITY;
  for (int step = 0; p.mse_clip && step < 80; ++step) {
    const double shrink = 1.0 - step / 100.0;
    const Grid grid = GridFromRange(shrink * low, shrink * high, max_code, p.symmetric);
    double error = 0;
    for (const double v : values) {
      const double back = grid.scale * (ToCode(v, grid, max_code) - grid.zero);
      error += std::pow(std::abs(back - v), 2.4);
    }
    if (error < best_error) {
      best_error = error;
      best = grid;
    }
  }
  return best;
}

// Algorithm 1 of the paper with lazy updates left out: every column updates all that follow.
// `u` [n, n] upper with H⁻¹ = UᵀU in processing order.
std::vector<double> ReferenceGptq(const Problem& p, const std::vector<float>& w,
                                  const std::vector<double>& u, const std::vector<int32_t>& perm) {
  const double max_code = (1 << p.bits) - 1;
  std::vector<double> dequantized(w.size());
  for (int64_t r = 0; r < p.rows; ++r) {
    std::vector<double> row(static_cast<size_t>(p.cols));
    for (int64_t c = 0; c < p.cols; ++c) row[c] = w[r * p.cols + perm[c]];
    Grid grid{};
    for (int64_t c = 0; c < p.cols; ++c) {
      if (c % p.group_size == 0) {
        grid = FindGrid({row.begin() + c, row.begin() + c + p.group_size}, max_code, p);
      }
      const double back = grid.scale * (ToCode(row[c], grid, max_code) - grid.zero);
      dequantized[r * p.cols + perm[c]] = back;
      const double error = (row[c] - back) / u[c * p.cols + c];
      for (int64_t j = c; j < p.cols; ++j) row[j] -= error * u[c * p.cols + j];
    }
  }
  return dequantized;
}

// U of a symmetric positive definite matrix, through the reversed Cholesky factor, in double.
std::vector<double> ReferenceFactor(const std::vector<double>& h, int64_t n) {
  std::vector<double> l(static_cast<size_t>(n * n), 0.0);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = h[(n - 1 - i) * n + n - 1 - j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
  std::vector<double> inverse(l.size(), 0.0);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = j; k < i; ++k) sum -= l[i * n + k] * inverse[k * n + j];
      inverse[i * n + j] = sum / l[i * n + i];
    }
  }
  std::reverse(inverse.begin(), inverse.end());
  return inverse;
}

using GptqFixture = GpuTest;

class GptqGpuTest : public GpuTest, public ::testing::WithParamInterface<Problem> {};

// Rounding differs between float and double near ties, so single codes may differ and then move
// their successors; what must agree is nearly all codes and the error that the method minimises.
TEST_P(GptqGpuTest, AgreesWithReference) {
  const Problem p = GetParam();
  const int64_t n_samples = 2 * p.cols;
  const std::vector<float> x = RandomNormal(n_samples * p.cols, 1);
  const std::vector<float> w = RandomNormal(p.rows * p.cols, 2, 0.02f);
  const std::vector<int32_t> perm = MakePermutation(p, 3);

  std::vector<double> h(static_cast<size_t>(p.cols * p.cols), 0.0);
  for (int64_t s = 0; s < n_samples; ++s) {
    for (int64_t i = 0; i < p.cols; ++i) {
      // A shared component makes the columns correlated, as activations are.
      const double xi = x[s * p.cols + i] + x[s * p.cols];
      for (int64_t j = 0; j < p.cols; ++j) {
        h[i * p.cols + j] += xi * (x[s * p.cols + j] + x[s * p.cols]);
      }
    }
  }
  const double damp = 0.01 * h[0] / 2;
  const std::vector<float> h_float(h.begin(), h.end());
  std::vector<double> h_ordered(h.size());
  for (int64_t i = 0; i < p.cols; ++i) {
    for (int64_t j = 0; j < p.cols; ++j) {
      h_ordered[i * p.cols + j] = h_float[perm[i] * p.cols + perm[j]];
    }
    h_ordered[i * p.cols + i] += static_cast<float>(damp);
  }
  const std::vector<double> u_expected = ReferenceFactor(h_ordered, p.cols);

  const auto device_h = Upload(h_float);
  const auto device_perm = Upload(perm);
  const auto device_add =
      Upload(std::vector<float>(static_cast<size_t>(p.cols), static_cast<float>(damp)));
  const auto device_w = Upload(w);
  auto u = Poisoned<float>(p.cols * p.cols);
  ASSERT_OK(FactorHessian(context(), {.dim = p.cols,
                                      .h = device_h.data(),
                                      .perm = device_perm.data(),
                                      .diagonal_add = device_add.data(),
                                      .u = u.data()}));
  std::vector<float> u_actual = Download(u);
  for (int64_t i = 0; i < p.cols; ++i) {
    for (int64_t j = 0; j < i; ++j) u_actual[i * p.cols + j] = 0;  // unspecified
  }
  EXPECT_LE(NormalizedSquaredError(u_actual, u_expected), 1e-8);

  const int64_t groups = p.cols / p.group_size;
  auto codes = Poisoned<uint8_t>(p.rows * p.cols);
  auto scales = Poisoned<float>(p.rows * groups);
  auto zeros = Poisoned<uint8_t>(p.rows * groups);
  auto loss = Poisoned<float>(p.rows);
  ASSERT_OK(QuantizeColumns(context(), {.rows = p.rows,
                                        .cols = p.cols,
                                        .w = device_w.data(),
                                        .u = u.data(),
                                        .perm = device_perm.data(),
                                        .bits = p.bits,
                                        .group_size = p.group_size,
                                        .symmetric = p.symmetric,
                                        .mse_clip = p.mse_clip,
                                        .codes = codes.data(),
                                        .scales = scales.data(),
                                        .zeros = zeros.data(),
                                        .loss = loss.data()}));
  const std::vector<uint8_t> host_codes = Download(codes);
  const std::vector<float> host_scales = Download(scales);
  const std::vector<uint8_t> host_zeros = Download(zeros);
  const std::vector<double> expected = ReferenceGptq(p, w, u_expected, perm);

  const auto output_error = [&](auto&& dequantized) {
    double sum = 0.0;
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.cols; ++i) {
        const double di = w[r * p.cols + i] - dequantized(r, i);
        for (int64_t j = 0; j < p.cols; ++j) {
          sum += di * h[i * p.cols + j] * (w[r * p.cols + j] - dequantized(r, j));
        }
      }
    }
    return sum;
  };
  const auto actual_weight = [&](int64_t r, int64_t c) {
    const int64_t g = r * groups + c / p.group_size;
    return static_cast<double>(host_scales[g]) *
           (static_cast<int>(host_codes[r * p.cols + c]) - static_cast<int>(host_zeros[g]));
  };
  int64_t n_equal = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.cols; ++c) {
      ASSERT_LT(host_codes[r * p.cols + c], 1 << p.bits);
      n_equal += std::abs(actual_weight(r, c) - expected[r * p.cols + c]) <
                 1e-3 * host_scales[r * groups + c / p.group_size];
    }
  }
  EXPECT_GE(static_cast<double>(n_equal) / static_cast<double>(p.rows * p.cols), 0.97);
  const double expected_error =
      output_error([&](int64_t r, int64_t c) { return expected[r * p.cols + c]; });
  EXPECT_NEAR(output_error(actual_weight) / expected_error, 1.0, 0.01);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GptqGpuTest,
    ::testing::Values(
        Problem{.rows = 1, .cols = 32, .bits = 2, .group_size = 32},
        Problem{.rows = 17, .cols = 128, .bits = 4, .group_size = 128},
        Problem{.rows = 33, .cols = 192, .bits = 3, .group_size = 64},
        Problem{.rows = 33, .cols = 192, .bits = 2, .group_size = 64, .permute = true},
        Problem{.rows = 31, .cols = 256, .bits = 2, .group_size = 128, .permute = true},
        Problem{.rows = 16, .cols = 256, .bits = 2, .group_size = 32, .permute = true},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 256},
        Problem{.rows = 16, .cols = 288, .bits = 8, .group_size = 288},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 64, .symmetric = true},
        Problem{.rows = 16, .cols = 256, .bits = 4, .group_size = 64, .mse_clip = false}));

TEST_F(GptqFixture, RefusesWhatIsNotPositiveDefinite) {
  std::vector<float> h(64 * 64, 0.0f);
  const auto device_h = Upload(h);
  std::vector<int32_t> perm(64);
  std::iota(perm.begin(), perm.end(), 0);
  const auto device_perm = Upload(perm);
  const auto add = Upload(std::vector<float>(64, 0.0f));
  auto u = Poisoned<float>(64 * 64);
  EXPECT_THAT(FactorHessian(context(), {.dim = 64,
                                        .h = device_h.data(),
                                        .perm = device_perm.data(),
                                        .diagonal_add = add.data(),
                                        .u = u.data()}),
              testing::HasCode(absl::StatusCode::kFailedPrecondition));
}

TEST_F(GptqFixture, RefusesGroupsThatDoNotFit) {
  EXPECT_THAT(QuantizeColumns(context(), {.rows = 1, .cols = 192, .group_size = 128}),
              testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                ::testing::HasSubstr("group_size: 128")));
  EXPECT_THAT(QuantizeColumns(context(), {.rows = 1, .cols = 137, .group_size = 137}),
              testing::HasCode(absl::StatusCode::kInvalidArgument));
}

class PackGpuTest : public GpuTest, public ::testing::WithParamInterface<int> {};

TEST_P(PackGpuTest, WritesTheArtifactsBitStream) {
  const int bits = GetParam();
  const int64_t rows = 96;
  const int64_t cols = 160;
  const int64_t group = 32;
  const int64_t groups = cols / group;
  std::mt19937 generator(7);
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
  std::vector<uint8_t> zeros(static_cast<size_t>(rows * groups));
  for (uint8_t& c : codes) c = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  for (uint8_t& z : zeros) z = static_cast<uint8_t>(generator() & ((1u << bits) - 1));
  std::vector<float> scales = RandomNormal(rows * groups, 9);
  for (float& s : scales) s = HalfToFloat(FloatToHalf(std::abs(s)));

  const auto device_codes = Upload(codes);
  const auto device_zeros = Upload(zeros);
  const auto device_scales = Upload(scales);
  auto qweight = Poisoned<uint32_t>(cols / 32 * bits * rows);
  auto qzeros = Poisoned<uint32_t>(groups * rows / 32 * bits);
  auto half_scales = Poisoned<__half>(groups * rows);
  auto dequantized = Poisoned<__nv_bfloat16>(rows * cols);
  ASSERT_OK(Pack({.rows = rows,
                  .cols = cols,
                  .bits = bits,
                  .group_size = group,
                  .codes = device_codes.data(),
                  .scales = device_scales.data(),
                  .zeros = device_zeros.data(),
                  .qweight = qweight.data(),
                  .qzeros = qzeros.data(),
                  .half_scales = half_scales.data(),
                  .dequantized = dequantized.data(),
                  .stream = context().stream()}));
  // Bit i·bits of a column's stream begins code i.
  std::vector<uint32_t> expected_weights(static_cast<size_t>(qweight.size()), 0);
  std::vector<uint32_t> expected_zeros(static_cast<size_t>(qzeros.size()), 0);
  const auto put = [&](std::vector<uint32_t>& words, auto word_index, int64_t i, uint32_t code) {
    for (int b = 0; b < bits; ++b) {
      const int64_t bit = i * bits + b;
      words[word_index(bit / 32)] |= ((code >> b) & 1u) << (bit % 32);
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      put(
          expected_weights, [&](int64_t m) { return m * rows + r; }, c, codes[r * cols + c]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      put(
          expected_zeros, [&](int64_t m) { return g * (rows / 32 * bits) + m; }, r,
          zeros[r * groups + g]);
    }
  }
  EXPECT_EQ(Download(qweight), expected_weights);
  EXPECT_EQ(Download(qzeros), expected_zeros);
  const std::vector<__half> host_scales = Download(half_scales);
  const std::vector<__nv_bfloat16> host_dequantized = Download(dequantized);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      EXPECT_EQ(__half2float(host_scales[g * rows + r]), scales[r * groups + g]);
    }
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t g = r * groups + c / group;
      const float w =
          scales[g] * static_cast<float>(static_cast<int>(codes[r * cols + c]) - zeros[g]);
      EXPECT_EQ(__bfloat162float(host_dequantized[r * cols + c]), Bf16ToFloat(FloatToBf16(w)));
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Bits, PackGpuTest, ::testing::Values(2, 3, 4, 8));

TEST_F(GptqFixture, FailedAllocationLeavesNothingBehind) {
  const int64_t before = DeviceMemoryUse().bytes_now;
  {
    const auto w = Upload(RandomNormal(64 * 128, 1));
    std::vector<int32_t> perm(128);
    std::iota(perm.begin(), perm.end(), 0);
    const auto device_perm = Upload(perm);
    auto codes = Poisoned<uint8_t>(64 * 128);
    auto scales = Poisoned<float>(64);
    auto zeros = Poisoned<uint8_t>(64);
    const QuantizeColumnsParams params{.rows = 64,
                                       .cols = 128,
                                       .w = w.data(),
                                       .perm = device_perm.data(),
                                       .codes = codes.data(),
                                       .scales = scales.data(),
                                       .zeros = zeros.data()};
    for (int64_t nth = 1; nth <= 2; ++nth) {
      FailAllocationForTest(nth);
      EXPECT_THAT(QuantizeColumns(context(), params),
                  testing::StatusIs(absl::StatusCode::kResourceExhausted,
                                    ::testing::HasSubstr("bytes needed")));
    }
    FailAllocationForTest(0);
    EXPECT_OK(QuantizeColumns(context(), params));
  }
  ASSERT_OK(context().Synchronize());
  EXPECT_EQ(DeviceMemoryUse().bytes_now, before);
}

}  // namespace
}  // namespace walsh::kernels::cuda
