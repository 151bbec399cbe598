// Forward operations on the device against the same formulas in double.
//
// Inputs of bf16 operations are rounded first, so that the limits measure the arithmetic alone.
#include <algorithm>
#include <cmath>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

constexpr double kBf16Limit = 1e-5;  // NMSE of bf16 results accumulated in fp32
constexpr double kFp32Limit = 1e-10;

using ForwardGpuTest = GpuTest;

std::vector<bf16> ToBf16(const std::vector<float>& values) {
  std::vector<bf16> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = __float2bfloat16(values[i]);
  return out;
}
std::vector<double> ToDouble(const std::vector<bf16>& values) {
  std::vector<double> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = __bfloat162float(values[i]);
  return out;
}
std::vector<double> ToDouble(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

TEST_F(ForwardGpuTest, GemmSweep) {
  for (const auto& [n, in, out] : std::vector<std::array<int64_t, 3>>{
           {0, 64, 64}, {1, 64, 64}, {3, 576, 192}, {17, 128, 384}, {131, 1536, 576}, {64, 8, 8}}) {
    const std::vector<bf16> x = ToBf16(RandomNormal(n * in, 1));
    const std::vector<bf16> w = ToBf16(RandomNormal(out * in, 2));
    const std::vector<double> xd = ToDouble(x);
    const std::vector<double> wd = ToDouble(w);
    std::vector<double> expected(static_cast<size_t>(n * out));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (int64_t k = 0; k < in; ++k) sum += xd[i * in + k] * wd[o * in + k];
        expected[i * out + o] = sum;
      }
    }
    const auto dx = Upload(x);
    const auto dw = Upload(w);
    auto y = Poisoned<float>(n * out);
    ASSERT_OK(Gemm(context(), GemmParams<float>{.n_tokens = n,
                                                .in = in,
                                                .out = out,
                                                .x = dx.data(),
                                                .weights = dw.data(),
                                                .y = y.data()}));
    EXPECT_LE(NormalizedSquaredError(Download(y), expected), kFp32Limit) << n << " " << in;
  }
}

TEST_F(ForwardGpuTest, GramSumsExactProducts) {
  for (const auto& [n, dim] :
       std::vector<std::array<int64_t, 2>>{{1, 32}, {1000, 576}, {4096, 2176}}) {
    const std::vector<bf16> x = ToBf16(RandomNormal(n * dim, 5));
    const std::vector<double> xd = ToDouble(x);
    const auto dx = Upload(x);
    auto h = Upload(std::vector<float>(static_cast<size_t>(dim * dim), 0.0f));
    // Twice, to see that it accumulates.
    ASSERT_OK(
        AccumulateGram(context(), {.n_tokens = n, .dim = dim, .x = dx.data(), .h = h.data()}));
    ASSERT_OK(
        AccumulateGram(context(), {.n_tokens = n, .dim = dim, .x = dx.data(), .h = h.data()}));
    ASSERT_OK(MirrorGram(context(), dim, h.data()));
    const std::vector<float> actual = Download(h);
    // Rows are sampled: the whole of it in double would take minutes on the host.
    double error = 0;
    double norm = 0;
    for (int64_t i = 0; i < dim; i += std::max<int64_t>(1, dim / 37)) {
      std::vector<double> expected(static_cast<size_t>(dim), 0.0);
      for (int64_t s = 0; s < n; ++s) {
        for (int64_t j = 0; j < dim; ++j) expected[j] += 2 * xd[s * dim + i] * xd[s * dim + j];
      }
      for (int64_t j = 0; j < dim; ++j) {
        error += std::pow(actual[i * dim + j] - expected[j], 2);
        norm += expected[j] * expected[j];
        ASSERT_EQ(actual[i * dim + j], actual[j * dim + i]);
      }
    }
    EXPECT_LE(error / norm, kFp32Limit) << dim;
  }
}

TEST_F(ForwardGpuTest, CrossGramSumsExactProducts) {
  for (const auto& [n, dim] :
       std::vector<std::array<int64_t, 2>>{{0, 32}, {1, 1}, {5, 7}, {130, 33}, {1000, 576}}) {
    const std::vector<bf16> x = ToBf16(RandomNormal(n * dim, 7));
    const std::vector<bf16> y = ToBf16(RandomNormal(n * dim, 8));
    const std::vector<double> xd = ToDouble(x);
    const std::vector<double> yd = ToDouble(y);
    const auto dx = Upload(x);
    const auto dy = Upload(y);
    auto c = Upload(std::vector<float>(static_cast<size_t>(dim * dim), 1.0f));
    // Twice, to see that it accumulates.
    for (int i = 0; i < 2; ++i) {
      ASSERT_OK(AccumulateCrossGram(
          context(), {.n_tokens = n, .dim = dim, .x = dx.data(), .y = dy.data(), .c = c.data()}));
    }
    std::vector<double> expected(static_cast<size_t>(dim * dim), 1.0);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t j = 0; j < dim; ++j) {
          expected[i * dim + j] += 2 * xd[t * dim + i] * yd[t * dim + j];
        }
      }
    }
    EXPECT_LE(NormalizedSquaredError(Download(c), expected), kFp32Limit) << n << " " << dim;
  }
}

TEST_F(ForwardGpuTest, SubtractRoundsOnce) {
  for (const int64_t n : {0, 1, 255, 257, 4099}) {
    const std::vector<float> a_values = RandomNormal(n, 9, 8.0f);
    std::vector<float> b_values = RandomNormal(n, 10);
    // From equal sizes to 2^-32 of each other.
    for (size_t i = 0; i < b_values.size(); ++i) {
      b_values[i] = std::ldexp(b_values[i], -static_cast<int>(i % 33));
    }
    const std::vector<bf16> a = ToBf16(a_values);
    const std::vector<bf16> b = ToBf16(b_values);
    const auto da = Upload(a);
    const auto db = Upload(b);
    auto y = Poisoned<bf16>(n);
    ASSERT_OK(Subtract(context(), n, da.data(), db.data(), y.data()));
    const std::vector<bf16> actual = Download(y);
    const std::vector<double> exact_a = ToDouble(a);
    const std::vector<double> exact_b = ToDouble(b);
    for (int64_t i = 0; i < n; ++i) {
      const double exact = exact_a[i] - exact_b[i];
      const float value = __bfloat162float(actual[i]);
      // No neighbour is nearer.
      const uint16_t bits = FloatToBf16(value);
      const double error = std::abs(exact - value);
      for (const int step : {-1, 1}) {
        const float neighbour = Bf16ToFloat(static_cast<uint16_t>(bits + step));
        if (std::isfinite(neighbour)) {
          EXPECT_LE(error, std::abs(exact - neighbour)) << i;
        }
      }
    }
  }
}

TEST_F(ForwardGpuTest, AddBiasToEveryRow) {
  for (const auto& [n, dim] : std::vector<std::array<int64_t, 2>>{
           {0, 5}, {3, 0}, {1, 1}, {7, 255}, {3, 257}, {131, 576}}) {
    const std::vector<float> x = RandomNormal(n * dim, 11);
    const std::vector<float> bias = RandomNormal(dim, 12);
    const auto db = Upload(bias);
    auto y = Upload(x);
    ASSERT_OK(AddBias<float>(context(), n, dim, db.data(), y.data()));
    auto yb = Upload(ToBf16(x));
    ASSERT_OK(AddBias<bf16>(context(), n, dim, db.data(), yb.data()));
    const std::vector<float> actual = Download(y);
    const std::vector<bf16> actual_bf16 = Download(yb);
    for (int64_t i = 0; i < n * dim; ++i) {
      ASSERT_EQ(actual[i], x[i] + bias[i % dim]) << n << " " << dim;
      const float sum = Bf16ToFloat(FloatToBf16(x[i])) + bias[i % dim];
      ASSERT_EQ(__bfloat162float(actual_bf16[i]), Bf16ToFloat(FloatToBf16(sum))) << n << " " << dim;
    }
  }
}

TEST_F(ForwardGpuTest, DiagonalInARow) {
  for (const int64_t dim : {0, 1, 31, 257, 1000}) {
    const std::vector<float> h = RandomNormal(dim * dim, 9);
    const auto dh = Upload(h);
    auto diagonal = Poisoned<float>(dim);
    ASSERT_OK(Diagonal(context(), dim, dh.data(), diagonal.data()));
    const std::vector<float> actual = Download(diagonal);
    for (int64_t i = 0; i < dim; ++i) EXPECT_EQ(actual[i], h[i * dim + i]) << dim;
  }
}

TEST_F(ForwardGpuTest, RmsNormSweep) {
  for (const int64_t dim : {1, 2, 31, 32, 33, 576, 4096}) {
    const int64_t n = 5;
    const std::vector<float> x = RandomNormal(n * dim, 3);
    const std::vector<float> weight = RandomNormal(dim, 4);
    std::vector<double> expected(x.size());
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < dim; ++j) sum += static_cast<double>(x[i * dim + j]) * x[i * dim + j];
      const double scale = 1 / std::sqrt(sum / static_cast<double>(dim) + 1e-5);
      for (int64_t j = 0; j < dim; ++j) expected[i * dim + j] = x[i * dim + j] * scale * weight[j];
    }
    const auto dx = Upload(x);
    const auto dw = Upload(weight);
    auto y = Poisoned<float>(n * dim);
    ASSERT_OK(RmsNorm<float>(context(), n, dim, dx.data(), dw.data(), 1e-5f, y.data()));
    EXPECT_LE(NormalizedSquaredError(Download(y), expected), kFp32Limit) << dim;
    auto yb = Poisoned<bf16>(n * dim);
    ASSERT_OK(RmsNorm<bf16>(context(), n, dim, dx.data(), dw.data(), 1e-5f, yb.data()));
    EXPECT_LE(NormalizedSquaredError(ToDouble(Download(yb)), expected), kBf16Limit) << dim;
  }
}

TEST_F(ForwardGpuTest, RopeRotatesPairs) {
  const int64_t window = 7;
  const int64_t n = 2 * window;
  const int64_t heads = 3;
  const int64_t head_dim = 16;
  std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / 16.0));
  }
  const std::vector<float> x = RandomNormal(n * heads * head_dim, 6);
  std::vector<double> expected(x.size());
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < head_dim / 2; ++i) {
        const double angle = static_cast<double>(t % window) * frequencies[i];
        const size_t a = (t * heads + h) * head_dim + i;
        const size_t b = a + head_dim / 2;
        expected[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
        expected[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
      }
    }
  }
  auto dx = Upload(x);
  const auto df = Upload(frequencies);
  ASSERT_OK(Rope<float>(context(), n, heads, head_dim, window, df.data(), dx.data()));
  EXPECT_LE(NormalizedSquaredError(Download(dx), expected), kFp32Limit);
}

std::vector<double> ReferenceAttention(const std::vector<double>& q, const std::vector<double>& k,
                                       const std::vector<double>& v, int64_t windows,
                                       int64_t window, int64_t heads, int64_t kv_heads,
                                       int64_t dim) {
  std::vector<double> y(q.size());
  for (int64_t b = 0; b < windows; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t kh = h / (heads / kv_heads);
      for (int64_t i = 0; i < window; ++i) {
        std::vector<double> scores(static_cast<size_t>(i + 1));
        double largest = -INFINITY;
        for (int64_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (int64_t d = 0; d < dim; ++d) {
            sum += q[((b * window + i) * heads + h) * dim + d] *
                   k[((b * window + j) * kv_heads + kh) * dim + d];
          }
          scores[j] = sum / std::sqrt(static_cast<double>(dim));
          largest = std::max(largest, scores[j]);
        }
        double total = 0;
        for (double& s : scores) total += s = std::exp(s - largest);
        for (int64_t d = 0; d < dim; ++d) {
          double sum = 0;
          for (int64_t j = 0; j <= i; ++j) {
            sum += scores[j] * v[((b * window + j) * kv_heads + kh) * dim + d];
          }
          y[((b * window + i) * heads + h) * dim + d] = sum / total;
        }
      }
    }
  }
  return y;
}

TEST_F(ForwardGpuTest, WindowAttentionSweep) {
  struct Shape {
    int64_t windows, window, heads, kv_heads, dim;
  };
  for (const Shape& s : std::vector<Shape>{{1, 1, 1, 1, 16},
                                           {2, 7, 4, 2, 32},
                                           {1, 63, 2, 1, 64},
                                           {1, 64, 2, 2, 64},
                                           {2, 65, 9, 3, 64},
                                           {1, 200, 4, 4, 128},
                                           {1, 257, 3, 1, 128}}) {
    const int64_t n = s.windows * s.window;
    const std::vector<bf16> q = ToBf16(RandomNormal(n * s.heads * s.dim, 11));
    const std::vector<bf16> k = ToBf16(RandomNormal(n * s.kv_heads * s.dim, 12));
    const std::vector<bf16> v = ToBf16(RandomNormal(n * s.kv_heads * s.dim, 13));
    const std::vector<double> expected = ReferenceAttention(
        ToDouble(q), ToDouble(k), ToDouble(v), s.windows, s.window, s.heads, s.kv_heads, s.dim);
    const auto dq = Upload(q);
    const auto dk = Upload(k);
    const auto dv = Upload(v);
    auto y = Poisoned<bf16>(n * s.heads * s.dim);
    ASSERT_OK(WindowAttention(context(), WindowAttentionParams<bf16>{.n_windows = s.windows,
                                                                     .window = s.window,
                                                                     .n_heads = s.heads,
                                                                     .n_kv_heads = s.kv_heads,
                                                                     .head_dim = s.dim,
                                                                     .q = dq.data(),
                                                                     .k = dk.data(),
                                                                     .v = dv.data(),
                                                                     .y = y.data()}));
    EXPECT_LE(NormalizedSquaredError(ToDouble(Download(y)), expected), kBf16Limit)
        << s.window << " " << s.dim;

    const auto to_float = [](const std::vector<bf16>& b) {
      std::vector<float> f(b.size());
      for (size_t i = 0; i < b.size(); ++i) f[i] = __bfloat162float(b[i]);
      return f;
    };
    const auto fq = Upload(to_float(q));
    const auto fk = Upload(to_float(k));
    const auto fv = Upload(to_float(v));
    auto fy = Poisoned<float>(n * s.heads * s.dim);
    ASSERT_OK(WindowAttention(context(), WindowAttentionParams<float>{.n_windows = s.windows,
                                                                      .window = s.window,
                                                                      .n_heads = s.heads,
                                                                      .n_kv_heads = s.kv_heads,
                                                                      .head_dim = s.dim,
                                                                      .q = fq.data(),
                                                                      .k = fk.data(),
                                                                      .v = fv.data(),
                                                                      .y = fy.data()}));
    EXPECT_LE(NormalizedSquaredError(Download(fy), expected), kFp32Limit);
  }
}

TEST_F(ForwardGpuTest, SiluMultiply) {
  const std::vector<float> gate = RandomNormal(1003, 1, 3.0f);
  const std::vector<float> up = RandomNormal(1003, 2);
  std::vector<double> expected(gate.size());
  for (size_t i = 0; i < gate.size(); ++i) {
    expected[i] = gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * up[i];
  }
  const auto dg = Upload(gate);
  const auto du = Upload(up);
  auto y = Poisoned<float>(1003);
  ASSERT_OK(SiluMultiply<float>(context(), 1003, dg.data(), du.data(), y.data()));
  EXPECT_LE(NormalizedSquaredError(Download(y), expected), kFp32Limit);
}

TEST_F(ForwardGpuTest, CrossEntropyAndKl) {
  const int64_t n = 7;
  const int64_t vocab = 2049;
  const std::vector<float> p = RandomNormal(n * vocab, 1, 4.0f);
  const std::vector<float> q = RandomNormal(n * vocab, 2, 4.0f);
  std::vector<int32_t> targets;
  std::vector<double> expected_loss;
  std::vector<double> expected_kl;
  for (int64_t i = 0; i < n; ++i) {
    targets.push_back(static_cast<int32_t>(i * 290));
    const auto lse = [&](const std::vector<float>& x) {
      double sum = 0;
      for (int64_t j = 0; j < vocab; ++j) sum += std::exp(static_cast<double>(x[i * vocab + j]));
      return std::log(sum);
    };
    const double lp = lse(p);
    const double lq = lse(q);
    expected_loss.push_back(lp - p[i * vocab + targets.back()]);
    double kl = 0;
    for (int64_t j = 0; j < vocab; ++j) {
      const double a = p[i * vocab + j] - lp;
      kl += std::exp(a) * (a - (q[i * vocab + j] - lq));
    }
    expected_kl.push_back(kl);
  }
  const auto dp = Upload(p);
  const auto dq = Upload(q);
  const auto dt = Upload(targets);
  auto loss = Poisoned<double>(n);
  auto kl = Poisoned<double>(n);
  auto top1 = Poisoned<int32_t>(n);
  ASSERT_OK(CrossEntropy(context(), n, vocab, dp.data(), dt.data(), loss.data()));
  ASSERT_OK(KlDivergence(context(), n, vocab, dp.data(), dq.data(), kl.data(), top1.data()));
  EXPECT_LE(NormalizedSquaredError(Download(loss), expected_loss), kFp32Limit);
  EXPECT_LE(NormalizedSquaredError(Download(kl), expected_kl), kFp32Limit);
  ASSERT_OK(KlDivergence(context(), n, vocab, dp.data(), dp.data(), kl.data(), top1.data()));
  for (const double x : Download(kl)) EXPECT_NEAR(x, 0, 1e-9);
  EXPECT_EQ(Download(top1), std::vector<int32_t>(n, 1));
}

}  // namespace
}  // namespace walsh::kernels::cuda
