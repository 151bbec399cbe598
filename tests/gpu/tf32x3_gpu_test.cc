// 3×TF32 products against double, beside those of fp32 and of plain TF32.
#include <array>
#include <cstdio>

#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/tf32x3.h"

namespace walsh::kernels::cuda {
namespace {

using Tf32x3GpuTest = GpuTest;

std::vector<double> Product(const std::vector<float>& x, const std::vector<float>& w, int64_t n,
                            int64_t in, int64_t out) {
  std::vector<double> y(static_cast<size_t>(n * out), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < in; ++k) {
        y[i * out + o] += static_cast<double>(x[i * in + k]) * w[o * in + k];
      }
    }
  }
  return y;
}

TEST_F(Tf32x3GpuTest, PartsAddUpToTheFloat) {
  for (const int64_t n : {0, 1, 7, 255, 257, 4099}) {
    const std::vector<float> x = RandomNormal(n, 1, 1e3f);
    const auto device_x = Upload(x);
    auto high = Poisoned<float>(n);
    auto low = Poisoned<float>(n);
    ASSERT_OK(SplitTf32(context(), n, device_x.data(), high.data(), low.data()));
    const std::vector<float> h = Download(high), l = Download(low);
    for (size_t i = 0; i < x.size(); ++i) {
      for (const float part : {h[i], l[i]}) {
        uint32_t bits = 0;
        std::memcpy(&bits, &part, sizeof(bits));
        ASSERT_EQ(bits & 0x1fff, 0u) << part << " has more bits than TF32";
      }
      const double difference =
          static_cast<double>(h[i]) + static_cast<double>(l[i]) - static_cast<double>(x[i]);
      ASSERT_LE(std::abs(difference), std::ldexp(std::abs(static_cast<double>(x[i])), -22));
    }
  }
}

TEST_F(Tf32x3GpuTest, HighPartInPlace) {
  const std::vector<float> x = RandomNormal(1000, 2);
  auto in_place = Upload(x);
  const auto device_x = Upload(x);
  auto high = Poisoned<float>(1000), low = Poisoned<float>(1000),
       low_of_in_place = Poisoned<float>(1000);
  ASSERT_OK(SplitTf32(context(), 1000, device_x.data(), high.data(), low.data()));
  ASSERT_OK(SplitTf32(context(), 1000, in_place.data(), in_place.data(), low_of_in_place.data()));
  EXPECT_EQ(Download(in_place), Download(high));
  EXPECT_EQ(Download(low_of_in_place), Download(low));
}

TEST_F(Tf32x3GpuTest, ProductsAreAsGoodAsFp32s) {
  for (const auto& [n, in, out] : std::vector<std::array<int64_t, 3>>{
           {0, 8, 8}, {1, 1, 1}, {3, 5, 7}, {17, 128, 384}, {131, 1536, 61}, {64, 4096, 96}}) {
    const std::vector<float> x = RandomNormal(n * in, 1);
    const std::vector<float> w = RandomNormal(out * in, 2, 0.02f);
    const std::vector<double> expected = Product(x, w, n, in, out);
    const auto dx = Upload(x), dw = Upload(w);
    auto x_high = Poisoned<float>(n * in), x_low = Poisoned<float>(n * in);
    auto w_high = Poisoned<float>(out * in), w_low = Poisoned<float>(out * in);
    auto y = Poisoned<float>(n * out), y_fp32 = Poisoned<float>(n * out);
    ASSERT_OK(SplitTf32(context(), n * in, dx.data(), x_high.data(), x_low.data()));
    ASSERT_OK(SplitTf32(context(), out * in, dw.data(), w_high.data(), w_low.data()));
    ASSERT_OK(GemmTf32x3(context(), {.n_tokens = n,
                                     .in = in,
                                     .out = out,
                                     .x_high = x_high.data(),
                                     .x_low = x_low.data(),
                                     .weights_high = w_high.data(),
                                     .weights_low = w_low.data(),
                                     .y = y.data()}));
    ASSERT_OK(GemmFp32(context(), {.n_tokens = n,
                                   .in = in,
                                   .out = out,
                                   .x = dx.data(),
                                   .weights = dw.data(),
                                   .y = y_fp32.data()}));
    const double error = std::sqrt(NormalizedSquaredError(Download(y), expected));
    const double of_fp32 = std::sqrt(NormalizedSquaredError(Download(y_fp32), expected));
    // TF32 alone is off by 2e-4.
    EXPECT_LE(error, 2e-6) << n << " x " << in << " x " << out;
    std::printf("%ld x %ld x %ld: relative error %.2e by 3xTF32, %.2e by fp32\n",
                static_cast<long>(n), static_cast<long>(in), static_cast<long>(out), error,
                of_fp32);
  }
}

}  // namespace
}  // namespace walsh::kernels::cuda
