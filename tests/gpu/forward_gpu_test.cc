// Forward operations on the device against kernels::ref, or its formulas written out, in double.
//
// Inputs of bf16 operations are rounded first, so that the limits measure the arithmetic alone.
// Outputs are poisoned, and so is what lies between rows and behind them, which must stay so.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/kernels.h"
#include "worker/tensor/half.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr double kBf16Limit = 1e-5;  // NMSE of bf16 results accumulated in fp32
constexpr double kFp32Limit = 1e-10;

const Stream kReference{.backend = Backend::kRef};

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

std::vector<float> ToFloat(const std::vector<bf16>& values) {
  std::vector<float> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = __bfloat162float(values[i]);
  return out;
}
std::vector<float> ToFloat(const std::vector<float>& values) { return values; }
template <typename T>
std::vector<T> FromFloat(const std::vector<float>& values) {
  if constexpr (std::is_same_v<T, bf16>) {
    return ToBf16(values);
  } else {
    return values;
  }
}
template <typename T>
constexpr double kLimitOf = std::is_same_v<T, bf16> ? kBf16Limit : kFp32Limit;

// As GpuTest::Poisoned has it.
template <typename T>
std::vector<T> PoisonOnHost(int64_t n) {
  std::vector<T> values(static_cast<size_t>(n));
  std::memset(static_cast<void*>(values.data()), 0xff, values.size() * sizeof(T));
  return values;
}
template <typename T>
bool IsPoison(const T& value) {
  const T poison = PoisonOnHost<T>(1)[0];
  return std::memcmp(&value, &poison, sizeof(T)) == 0;
}

// Rows of `width`, `stride` apart, without what lies between and behind them; that must be poison.
template <typename T>
std::vector<T> RowsOf(const std::vector<T>& values, int64_t rows, int64_t width, int64_t stride) {
  std::vector<T> out;
  int64_t n_written = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    if (i / stride < rows && i % stride < width) {
      out.push_back(values[i]);
    } else {
      n_written += IsPoison(values[i]) ? 0 : 1;
    }
  }
  EXPECT_EQ(n_written, 0) << "what was written outside of " << rows << " rows of " << width << ", "
                          << stride << " apart";
  return out;
}
template <typename T>
std::vector<T> RowsOf(const std::vector<T>& values, int64_t rows, int64_t width) {
  return RowsOf(values, rows, width, std::max<int64_t>(width, 1));
}

constexpr int64_t kBehind = 64;  // elements of poison behind an output

struct Product {
  int64_t n, in, out;
  int64_t gap = 0;  // between rows of y
  bool accumulate = false;
};
std::vector<Product> Products(bool with_gaps) {
  std::vector<Product> products;
  for (const auto& [n, in, out] : std::vector<std::array<int64_t, 3>>{{0, 64, 64},
                                                                      {1, 1, 1},
                                                                      {1, 64, 64},
                                                                      {5, 64, 0},
                                                                      {2, 1, 7},
                                                                      {3, 576, 192},
                                                                      {7, 5, 3},
                                                                      {17, 128, 384},
                                                                      {31, 37, 41},
                                                                      {131, 1536, 576},
                                                                      {64, 8, 8},
                                                                      {257, 127, 129}}) {
    for (const bool accumulate : {false, true}) {
      products.push_back({n, in, out, 0, accumulate});
      if (!with_gaps) continue;
      for (const int64_t gap : {1, 8, 13}) products.push_back({n, in, out, gap, accumulate});
    }
  }
  return products;
}

// Runs `product` on the device into rows that are `gap` apart and compares it with the reference.
template <typename In, typename Out, typename Run>
void CheckProduct(const Product& p, const std::vector<In>& x, const std::vector<In>& w,
                  std::vector<Out> y, Run&& run) {
  const int64_t stride = p.out + p.gap;
  std::vector<float> expected(static_cast<size_t>(p.n * p.out));
  for (int64_t i = 0; i < p.n; ++i) {
    for (int64_t o = 0; o < p.out; ++o) {
      expected[i * p.out + o] = ToFloat(std::vector<Out>{y[i * stride + o]})[0];
    }
  }
  const std::vector<float> x_float = ToFloat(x);
  const std::vector<float> w_float = ToFloat(w);
  ASSERT_OK(ref::Matmul({.n_tokens = p.n,
                         .in = p.in,
                         .out = p.out,
                         .x = x_float.data(),
                         .x_stride = p.in,
                         .weights = w_float.data(),
                         .y = expected.data(),
                         .y_stride = p.out,
                         .accumulate = p.accumulate},
                        kReference));
  const std::vector<Out> actual = run(y);
  EXPECT_LE(NormalizedSquaredError(
                ToFloat(RowsOf(actual, p.n, p.out, std::max<int64_t>(stride, 1))), expected),
            kLimitOf<Out>)
      << p.n << " x " << p.in << " x " << p.out << ", gap " << p.gap
      << (p.accumulate ? ", accumulated" : "");
}

// What a product begins with: poison, and numbers where it adds to them.
template <typename Out>
std::vector<Out> ProductBefore(const Product& p) {
  const int64_t stride = p.out + p.gap;
  std::vector<Out> y = PoisonOnHost<Out>(p.n * stride + kBehind);
  if (!p.accumulate) return y;
  const std::vector<Out> numbers = FromFloat<Out>(RandomNormal(p.n * p.out, 3, 4.0f));
  for (int64_t i = 0; i < p.n; ++i) {
    std::copy_n(numbers.begin() + i * p.out, p.out, y.begin() + i * stride);
  }
  return y;
}

template <typename Out>
class GemmGpuTest : public GpuTest {};
using GemmOutputs = ::testing::Types<float, bf16>;
TYPED_TEST_SUITE(GemmGpuTest, GemmOutputs);

TYPED_TEST(GemmGpuTest, Sweep) {
  for (const Product& p : Products(/*with_gaps=*/true)) {
    const std::vector<bf16> x = ToBf16(RandomNormal(p.n * p.in, 1));
    const std::vector<bf16> w = ToBf16(RandomNormal(p.out * p.in, 2));
    const auto dx = this->Upload(x);
    const auto dw = this->Upload(w);
    CheckProduct(p, x, w, ProductBefore<TypeParam>(p), [&](const std::vector<TypeParam>& before) {
      auto y = this->Upload(before);
      EXPECT_OK(
          Gemm(this->context(), GemmParams<TypeParam>{.n_tokens = p.n,
                                                      .in = p.in,
                                                      .out = p.out,
                                                      .x = dx.data(),
                                                      .weights = dw.data(),
                                                      .y = y.data(),
                                                      .y_stride = p.gap == 0 ? 0 : p.out + p.gap,
                                                      .accumulate = p.accumulate}));
      return this->Download(y);
    });
  }
}

TEST_F(ForwardGpuTest, GemmFp32Sweep) {
  for (const Product& p : Products(/*with_gaps=*/false)) {
    const std::vector<float> x = RandomNormal(p.n * p.in, 1);
    const std::vector<float> w = RandomNormal(p.out * p.in, 2);
    const auto dx = Upload(x);
    const auto dw = Upload(w);
    CheckProduct(p, x, w, ProductBefore<float>(p), [&](const std::vector<float>& before) {
      auto y = Upload(before);
      EXPECT_OK(GemmFp32(context(), {.n_tokens = p.n,
                                     .in = p.in,
                                     .out = p.out,
                                     .x = dx.data(),
                                     .weights = dw.data(),
                                     .y = y.data(),
                                     .accumulate = p.accumulate}));
      return Download(y);
    });
  }
}

TEST_F(ForwardGpuTest, GramSumsExactProducts) {
  for (const auto& [n, dim] : std::vector<std::array<int64_t, 2>>{
           {0, 7}, {1, 0}, {1, 1}, {1, 32}, {5, 7}, {31, 2053}, {1000, 576}, {4096, 2176}}) {
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
    EXPECT_LE(error, kFp32Limit * norm) << n << " " << dim;
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

template <typename T>
class ElementwiseGpuTest : public GpuTest {
 protected:
  void CheckRmsNorm(int64_t n, int64_t dim, bool has_weight);
  void CheckRope(int64_t n_windows, int64_t window, int64_t heads, int64_t head_dim, double limit);
  template <typename Params>
  void CheckGated(int64_t n, absl::Status (*reference)(const Params&, const Stream&),
                  absl::Status (*operation)(Context&, int64_t, const T*, const T*, T*));
  void CheckEmbed(int64_t n, int64_t dim);
};
using ElementTypes = ::testing::Types<float, bf16>;
TYPED_TEST_SUITE(ElementwiseGpuTest, ElementTypes);

template <typename T>
void ElementwiseGpuTest<T>::CheckRmsNorm(int64_t n, int64_t dim, bool has_weight) {
  const std::vector<float> x = RandomNormal(n * dim, 3);
  const std::vector<float> weight = RandomNormal(dim, 4);
  std::vector<float> expected(x.size());
  ASSERT_OK(ref::RmsNorm({.n_tokens = n,
                          .dim = dim,
                          .x = x.data(),
                          .weight = has_weight ? weight.data() : nullptr,
                          .eps = 1e-5f,
                          .y = expected.data()},
                         kReference));
  const auto dx = Upload(x);
  const auto dw = Upload(weight);
  auto y = Poisoned<T>(n * dim + kBehind);
  ASSERT_OK(
      RmsNorm<T>(context(), n, dim, dx.data(), has_weight ? dw.data() : nullptr, 1e-5f, y.data()));
  EXPECT_LE(NormalizedSquaredError(ToFloat(RowsOf(Download(y), n, dim)), expected), kLimitOf<T>)
      << n << " " << dim << " " << has_weight;
}

TYPED_TEST(ElementwiseGpuTest, RmsNormSweep) {
  for (const int64_t dim : {1, 2, 31, 32, 33, 576, 4096, 11008}) {
    for (const int64_t n : {0, 1, 5}) {
      for (const bool has_weight : {true, false}) this->CheckRmsNorm(n, dim, has_weight);
    }
  }
}

template <typename T>
void ElementwiseGpuTest<T>::CheckRope(int64_t n_windows, int64_t window, int64_t heads,
                                      int64_t head_dim, double limit) {
  const int64_t n = n_windows * window;
  const int64_t width = heads * head_dim;
  std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = static_cast<float>(
        std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)));
  }
  std::vector<int32_t> positions(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(i % window);
  std::vector<T> x = FromFloat<T>(RandomNormal(n * width, 6));
  std::vector<float> expected = ToFloat(x);
  ASSERT_OK(ref::Rope({.n_tokens = n,
                       .n_heads = heads,
                       .head_dim = head_dim,
                       .positions = positions.data(),
                       .inverse_frequencies = frequencies.data(),
                       .x = expected.data(),
                       .x_stride = width},
                      kReference));
  const std::vector<T> behind = PoisonOnHost<T>(kBehind);
  x.insert(x.end(), behind.begin(), behind.end());
  auto dx = Upload(x);
  const auto df = Upload(frequencies);
  ASSERT_OK(Rope<T>(context(), n, heads, head_dim, window, df.data(), dx.data()));
  EXPECT_LE(NormalizedSquaredError(ToFloat(RowsOf(Download(dx), n, width)), expected), limit)
      << n_windows << " " << window << " " << heads << " " << head_dim;
}

TYPED_TEST(ElementwiseGpuTest, RopeRotatesPairs) {
  for (const int64_t head_dim : {2, 16, 64, 128}) {
    for (const int64_t heads : {0, 1, 3, 9}) {
      for (const int64_t window : {1, 7, 31}) {
        for (const int64_t n_windows : {0, 1, 2}) {
          this->CheckRope(n_windows, window, heads, head_dim, kLimitOf<TypeParam>);
        }
      }
    }
  }
  // Angles are float: rounded by up to 2^-14 at position 2048.
  this->CheckRope(1, 2048, 1, 64, std::max(kLimitOf<TypeParam>, 1e-8));
}

TEST_F(ForwardGpuTest, RopeRefusesWhatIsNoPairsOrNoWindow) {
  EXPECT_THAT(Rope<float>(context(), 1, 1, 15, 1, nullptr, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head_dim: 15")));
  EXPECT_THAT(Rope<float>(context(), 1, 1, 16, 0, nullptr, nullptr),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("window: 0")));
}

struct AttentionShape {
  int64_t windows, window, heads, kv_heads, dim;
  float sigma = 1;  // of queries: large ones leave one key a query
};

class AttentionGpuTest : public GpuTest {
 protected:
  template <typename T>
  void Check(const AttentionShape& s) {
    const int64_t n = s.windows * s.window;
    const int64_t width = s.heads * s.dim;
    const int64_t kv_width = s.kv_heads * s.dim;
    const std::vector<T> q = FromFloat<T>(RandomNormal(n * width, 11, s.sigma));
    const std::vector<T> k = FromFloat<T>(RandomNormal(n * kv_width, 12));
    const std::vector<T> v = FromFloat<T>(RandomNormal(n * kv_width, 13));
    const std::vector<float> q_float = ToFloat(q);
    const std::vector<float> k_float = ToFloat(k);
    const std::vector<float> v_float = ToFloat(v);
    std::vector<float> expected(q.size());
    for (int64_t b = 0; b < s.windows; ++b) {
      const int64_t row = b * s.window;
      ASSERT_OK(ref::Attention({.n_new = s.window,
                                .n_heads = s.heads,
                                .n_kv_heads = s.kv_heads,
                                .head_dim = s.dim,
                                .scale = 1.0f / std::sqrt(static_cast<float>(s.dim)),
                                .q = q_float.data() + row * width,
                                .q_stride = width,
                                .k = k_float.data() + row * kv_width,
                                .v = v_float.data() + row * kv_width,
                                .kv_stride = kv_width,
                                .y = expected.data() + row * width,
                                .y_stride = width},
                               kReference));
    }
    const auto dq = Upload(q);
    const auto dk = Upload(k);
    const auto dv = Upload(v);
    auto y = Poisoned<T>(n * width + kBehind);
    ASSERT_OK(WindowAttention(context(), WindowAttentionParams<T>{.n_windows = s.windows,
                                                                  .window = s.window,
                                                                  .n_heads = s.heads,
                                                                  .n_kv_heads = s.kv_heads,
                                                                  .head_dim = s.dim,
                                                                  .q = dq.data(),
                                                                  .k = dk.data(),
                                                                  .v = dv.data(),
                                                                  .y = y.data()}));
    EXPECT_LE(NormalizedSquaredError(ToFloat(RowsOf(Download(y), n, width)), expected), kLimitOf<T>)
        << s.windows << " windows of " << s.window << ", " << s.heads << "/" << s.kv_heads
        << " heads of " << s.dim;
  }
  void CheckBoth(const AttentionShape& s) {
    Check<bf16>(s);
    Check<float>(s);
  }
};

// Around the tiles of 64 keys and 128 queries, in every size of a head.
TEST_F(AttentionGpuTest, WindowSweep) {
  for (const int64_t dim : {16, 32, 64, 128}) {
    for (const int64_t window : {1, 7, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300}) {
      CheckBoth({1 + window % 2, window, 2, 1, dim});
    }
  }
}

// Around the 16 heads whose blocks of threads are ordered together, and nothing at all.
TEST_F(AttentionGpuTest, HeadSweep) {
  for (const auto& [heads, kv_heads] : std::vector<std::array<int64_t, 2>>{
           {0, 1}, {1, 1}, {9, 3}, {15, 5}, {16, 16}, {17, 1}, {32, 8}, {35, 7}}) {
    for (const int64_t windows : {0, 1, 3}) CheckBoth({windows, 131, heads, kv_heads, 64});
  }
  CheckBoth({1, 0, 4, 2, 64});
}

TEST_F(AttentionGpuTest, LongWindows) {
  Check<bf16>({1, 1031, 2, 1, 128});
  Check<bf16>({1, 2048, 1, 1, 64});
  Check<float>({1, 1031, 1, 1, 16});
}

// Maxima that move far from one step of keys to the next.
TEST_F(AttentionGpuTest, LargeScores) {
  for (const int64_t dim : {16, 64, 128}) CheckBoth({1, 300, 2, 1, dim, 20.0f});
}

TEST_F(AttentionGpuTest, RefusesWhatItDoesNotTake) {
  EXPECT_THAT(WindowAttention(
                  context(),
                  WindowAttentionParams<bf16>{
                      .n_windows = 1, .window = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 80}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head_dim: 80")));
  EXPECT_THAT(WindowAttention(
                  context(),
                  WindowAttentionParams<float>{
                      .n_windows = 1, .window = 1, .n_heads = 4, .n_kv_heads = 3, .head_dim = 16}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("n_heads: 4")));
  EXPECT_THAT(
      WindowAttention(
          context(),
          WindowAttentionParams<float>{
              .n_windows = 1, .window = 12288, .n_heads = 1, .n_kv_heads = 1, .head_dim = 16}),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 12284 tokens")));
}

// Its scores fill the shared memory that every device has.
TEST_F(AttentionGpuTest, LargestWindowOfTheFp32Form) { Check<float>({1, 12284, 1, 1, 1}); }

template <typename T>
template <typename Params>
void ElementwiseGpuTest<T>::CheckGated(int64_t n,
                                       absl::Status (*reference)(const Params&, const Stream&),
                                       absl::Status (*operation)(Context&, int64_t, const T*,
                                                                 const T*, T*)) {
  const std::vector<T> gate = FromFloat<T>(RandomNormal(n, 1, 3.0f));
  const std::vector<T> up = FromFloat<T>(RandomNormal(n, 2));
  const std::vector<float> gate_float = ToFloat(gate);
  const std::vector<float> up_float = ToFloat(up);
  std::vector<float> expected(gate.size());
  Params params;
  params.n_tokens = 1;
  params.dim = n;
  params.gate = gate_float.data();
  params.gate_stride = n;
  params.up = up_float.data();
  params.up_stride = n;
  params.y = expected.data();
  params.y_stride = n;
  ASSERT_OK(reference(params, kReference));
  const auto dg = this->Upload(gate);
  const auto du = this->Upload(up);
  auto y = this->template Poisoned<T>(n + kBehind);
  ASSERT_OK(operation(this->context(), n, dg.data(), du.data(), y.data()));
  EXPECT_LE(NormalizedSquaredError(ToFloat(RowsOf(this->Download(y), 1, n)), expected), kLimitOf<T>)
      << n;
}

TYPED_TEST(ElementwiseGpuTest, SiluMultiplySweep) {
  for (const int64_t n : {0, 1, 255, 256, 257, 1009, 4099}) {
    this->template CheckGated<SiluMultiplyParams>(n, ref::SiluMultiply, SiluMultiply<TypeParam>);
  }
}
TYPED_TEST(ElementwiseGpuTest, GeluMultiplySweep) {
  for (const int64_t n : {0, 1, 255, 256, 257, 1009, 4099}) {
    this->template CheckGated<GeluMultiplyParams>(n, ref::GeluMultiply, GeluMultiply<TypeParam>);
  }
}

template <typename T>
void ElementwiseGpuTest<T>::CheckEmbed(int64_t n, int64_t dim) {
  constexpr int64_t kVocab = 13;
  const std::vector<T> embedding = FromFloat<T>(RandomNormal(kVocab * dim, 1));
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i * 5 % kVocab);
  const auto de = Upload(embedding);
  const auto di = Upload(ids);
  auto hidden = Poisoned<float>(n * dim + kBehind);
  ASSERT_OK(Embed<T>(context(), n, dim, di.data(), de.data(), hidden.data()));
  const std::vector<float> actual = RowsOf(Download(hidden), n, dim);
  const std::vector<float> rows = ToFloat(embedding);
  for (int64_t i = 0; i < n * dim; ++i) {
    ASSERT_EQ(actual[i], rows[ids[i / dim] * dim + i % dim]) << n << " " << dim << " " << i;
  }
}

TYPED_TEST(ElementwiseGpuTest, EmbedSweep) {
  for (const int64_t n : {0, 1, 31}) {
    for (const int64_t dim : {1, 255, 257, 576}) this->CheckEmbed(n, dim);
  }
}

TEST_F(ForwardGpuTest, ConvertRoundsOnceAndBack) {
  for (const int64_t n : {0, 1, 255, 256, 257, 4099}) {
    const std::vector<float> x = RandomNormal(n, 1);
    const auto dx = Upload(x);
    auto rounded = Poisoned<bf16>(n + kBehind);
    ASSERT_OK((Convert<float, bf16>(context(), n, dx.data(), rounded.data())));
    auto back = Poisoned<float>(n + kBehind);
    ASSERT_OK((Convert<bf16, float>(context(), n, rounded.data(), back.data())));
    const std::vector<float> actual_rounded = ToFloat(RowsOf(Download(rounded), 1, n));
    const std::vector<float> actual_back = RowsOf(Download(back), 1, n);
    for (int64_t i = 0; i < n; ++i) {
      ASSERT_EQ(actual_rounded[i], Bf16ToFloat(FloatToBf16(x[i]))) << n;
      ASSERT_EQ(actual_back[i], actual_rounded[i]) << n;
    }
  }
}

class LossGpuTest : public GpuTest {
 protected:
  void Check(int64_t n, int64_t vocab) {
    const std::vector<float> p = RandomNormal(n * vocab, 1, 4.0f);
    const std::vector<float> q = RandomNormal(n * vocab, 2, 4.0f);
    std::vector<int32_t> targets;
    std::vector<double> expected_kl;
    std::vector<int32_t> expected_top1;
    for (int64_t i = 0; i < n; ++i) {
      targets.push_back(static_cast<int32_t>(i * 290 % vocab));
      const float* p_row = p.data() + i * vocab;
      const float* q_row = q.data() + i * vocab;
      const auto lse = [&](const float* row) {
        const double largest = *std::max_element(row, row + vocab);
        double sum = 0;
        for (int64_t j = 0; j < vocab; ++j) sum += std::exp(row[j] - largest);
        return largest + std::log(sum);
      };
      const double lp = lse(p_row);
      const double lq = lse(q_row);
      double kl = 0;
      for (int64_t j = 0; j < vocab; ++j) {
        const double a = p_row[j] - lp;
        kl += std::exp(a) * (a - (q_row[j] - lq));
      }
      expected_kl.push_back(kl);
      const auto p_top = std::max_element(p_row, p_row + vocab) - p_row;
      const auto q_top = std::max_element(q_row, q_row + vocab) - q_row;
      expected_top1.push_back(p_top == q_top ? 1 : 0);
    }
    std::vector<double> expected_loss(static_cast<size_t>(n));
    ASSERT_OK(ref::CrossEntropy({.n_tokens = n,
                                 .vocab = vocab,
                                 .logits = p.data(),
                                 .targets = targets.data(),
                                 .loss = expected_loss.data()},
                                kReference));
    const auto dp = Upload(p);
    const auto dq = Upload(q);
    const auto dt = Upload(targets);
    auto loss = Poisoned<double>(n + kBehind);
    auto kl = Poisoned<double>(n + kBehind);
    auto top1 = Poisoned<int32_t>(n + kBehind);
    ASSERT_OK(CrossEntropy(context(), n, vocab, dp.data(), dt.data(), loss.data()));
    ASSERT_OK(KlDivergence(context(), n, vocab, dp.data(), dq.data(), kl.data(), top1.data()));
    EXPECT_LE(NormalizedSquaredError(RowsOf(Download(loss), 1, n), expected_loss), kFp32Limit)
        << n << " " << vocab;
    const std::vector<double> actual_kl = RowsOf(Download(kl), 1, n);
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_NEAR(actual_kl[i], expected_kl[i], 1e-6 * (1 + expected_kl[i])) << n << " " << vocab;
    }
    EXPECT_EQ(RowsOf(Download(top1), 1, n), expected_top1) << n << " " << vocab;
    ASSERT_OK(KlDivergence(context(), n, vocab, dp.data(), dp.data(), kl.data(), top1.data()));
    for (const double x : RowsOf(Download(kl), 1, n)) EXPECT_NEAR(x, 0, 1e-9);
    EXPECT_EQ(RowsOf(Download(top1), 1, n), std::vector<int32_t>(static_cast<size_t>(n), 1));
  }
};

TEST_F(LossGpuTest, CrossEntropyAndKl) {
  for (const int64_t vocab : {1, 2, 31, 257, 2049, 32003}) {
    for (const int64_t n : {0, 1, 7}) Check(n, vocab);
  }
}

}  // namespace
}  // namespace walsh::kernels::cuda
