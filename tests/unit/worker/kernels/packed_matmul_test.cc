#include "worker/kernels/cpu/packed_matmul.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/unit/worker/kernels/kernel_harness.h"
#include "tests/unit/worker/kernels/random_quantized.h"
#include "worker/kernels/cpu/cpu_features.h"

namespace walsh::kernels {
namespace {

using testing::PoisonedFloats;
using testing::RandomCodebook;
using testing::RandomFloats;
using testing::RandomFloatZeros;
using testing::RandomQuantized;

std::vector<cpu::PackedKernel> RunnableKernels() {
  std::vector<cpu::PackedKernel> kernels = {cpu::ScalarPackedKernel()};
  if (cpu::GetCpuFeatures().avx2_fma) kernels.push_back(cpu::Avx2PackedKernel());
  if (cpu::GetCpuFeatures().avx512_vnni) kernels.push_back(cpu::Avx512VnniPackedKernel());
  return kernels;
}

constexpr testing::CompareLimits kLimits{.max_abs = 1e-4, .max_rel = 1e-4, .nmse = 1e-10};

PackedMatrix Packed(const QuantizedMatrix& m) {
  absl::StatusOr<PackedMatrix> packed = PackedMatrix::Pack(m);
  EXPECT_OK(packed);
  return *std::move(packed);
}

// Every kernel that this machine runs against the reference.
void TestPacked(const PackedMatrix& weights, int64_t n_tokens, bool with_bias, int64_t padding) {
  SCOPED_TRACE(::testing::Message()
               << weights.bits() << " bits, " << weights.rows() << " x " << weights.cols()
               << ", group " << weights.group_size() << ", " << n_tokens << " tokens");
  const int64_t x_stride = weights.cols() + padding;
  const int64_t y_stride = weights.rows() + padding;
  const auto x = RandomFloats(n_tokens * x_stride, 1);
  const auto bias = RandomFloats(weights.rows(), 2);
  std::vector<float> initial(static_cast<size_t>(n_tokens * y_stride), 7.0f);
  for (int64_t t = 0; t < n_tokens; ++t) {
    std::fill_n(initial.begin() + t * y_stride, weights.rows(),
                std::numeric_limits<float>::quiet_NaN());
  }
  PackedMatmulParams params{.n_tokens = n_tokens,
                            .x = x.data(),
                            .x_stride = x_stride,
                            .weights = &weights,
                            .bias = with_bias ? bias.data() : nullptr,
                            .y_stride = y_stride};
  for (const cpu::PackedKernel& kernel : RunnableKernels()) {
    SCOPED_TRACE(kernel.name);
    ExpectLikeReference(
        initial,
        [&](const Stream& stream, float* y) {
          params.y = y;
          if (stream.backend == Backend::kRef) return PackedMatmul(params, stream);
          return cpu::PackedMatmulWith(kernel, {&params, 1}, stream);
        },
        kLimits);
  }
}

TEST(PackedMatmulTest, EveryFormat) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t group : {32, 64, 128, 384}) {
      for (const bool symmetric : {false, true}) {
        const PackedMatrix weights = Packed(RandomQuantized(37, 384, bits, group, symmetric));
        for (const int64_t n_tokens : {1, 2, 5, 13}) TestPacked(weights, n_tokens, true, 3);
      }
    }
  }
}

TEST(PackedMatmulTest, FloatZeros) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t group : {32, 128, 384}) {
      const PackedMatrix weights = Packed(RandomFloatZeros(37, 384, bits, group));
      for (const int64_t n_tokens : {1, 2, 5, 13}) TestPacked(weights, n_tokens, true, 3);
    }
  }
}

TEST(PackedMatmulTest, Codebooks) {
  for (const int64_t group : {32, 64, 128, 384}) {
    const PackedMatrix weights = Packed(RandomCodebook(37, 384, group));
    for (const int64_t n_tokens : {0, 1, 2, 3, 5, 8, 9, 13, 64, 257}) {
      TestPacked(weights, n_tokens, n_tokens % 2 == 1, 3);
    }
  }
  for (int64_t rows = 0; rows <= 33; ++rows) {
    TestPacked(Packed(RandomCodebook(rows, 64, 32)), 3, true, 1);
  }
  for (const int64_t cols : TestSizes()) {
    TestPacked(Packed(RandomCodebook(19, cols, std::max<int64_t>(1, cols))), 2, false, 0);
  }
}

TEST(PackedMatmulTest, EveryRowCount) {
  for (int64_t rows = 0; rows <= 33; ++rows) {
    TestPacked(Packed(RandomQuantized(rows, 64, 4, 32, false)), 3, true, 1);
  }
}

TEST(PackedMatmulTest, EveryWidth) {
  for (const int bits : {2, 3, 4, 8}) {
    for (const int64_t cols : TestSizes()) {
      const int64_t group = std::max<int64_t>(1, cols);
      TestPacked(Packed(RandomQuantized(19, cols, bits, group, false)), 2, false, 0);
    }
  }
}

TEST(PackedMatmulTest, EveryTokenCount) {
  for (const int bits : {2, 3, 4, 8}) {
    const PackedMatrix weights = Packed(RandomQuantized(24, 96, bits, 32, false));
    for (const int64_t n_tokens :
         {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 31, 64, 255, 256, 257}) {
      TestPacked(weights, n_tokens, true, 0);
    }
  }
}

TEST(PackedMatmulTest, ModelShapes) {
  TestPacked(Packed(RandomQuantized(576, 1536, 4, 64, false)), 3, false, 0);
  TestPacked(Packed(RandomQuantized(1536, 576, 2, 64, false)), 17, false, 0);
  TestPacked(Packed(RandomQuantized(192, 576, 3, 576, true)), 1, false, 0);
  TestPacked(Packed(RandomQuantized(64, 172, 4, 172, false)), 9, false, 0);
}

TEST(PackedMatmulTest, HeadShape) {
  Matrix head(49152, 64);
  const auto values = RandomFloats(head.size(), 3, 0.05f);
  std::copy(values.begin(), values.end(), head.data());
  ASSERT_OK_AND_ASSIGN(const PackedMatrix weights, PackedMatrix::PackDense8(head));
  TestPacked(weights, 1, false, 0);
}

// The largest sums that codes and activations can make: nothing may saturate.
TEST(PackedMatmulTest, LargestCodes) {
  for (const int bits : {2, 3, 4, 8}) {
    QuantizedMatrix m = RandomQuantized(16, 2048, bits, 2048, false);
    std::fill(m.codes.begin(), m.codes.end(), static_cast<uint8_t>((1 << bits) - 1));
    std::fill(m.zeros.begin(), m.zeros.end(), uint8_t{0});
    const PackedMatrix weights = Packed(m);
    for (const float value : {1.0f, -1.0f}) {
      const std::vector<float> x(2048 * 9, value);
      for (const cpu::PackedKernel& kernel : RunnableKernels()) {
        ExpectLikeReference(PoisonedFloats(16 * 9),
                            [&](const Stream& stream, float* y) {
                              const PackedMatmulParams params{.n_tokens = 9,
                                                              .x = x.data(),
                                                              .x_stride = 2048,
                                                              .weights = &weights,
                                                              .y = y,
                                                              .y_stride = 16};
                              if (stream.backend == Backend::kRef)
                                return PackedMatmul(params, stream);
                              return cpu::PackedMatmulWith(kernel, {&params, 1}, stream);
                            },
                            {.max_abs = 1e-2, .max_rel = 1e-5, .nmse = 1e-10});
      }
    }
  }
}

// A token's row has the same bits alone and in a batch of any size.
TEST(PackedMatmulTest, RowsDoNotDependOnTheBatch) {
  constexpr int64_t kTokens = 300;
  constexpr int kCodebook = 0;
  for (const int bits : {2, 3, 4, 8, kCodebook}) {
    const PackedMatrix weights =
        Packed(bits == kCodebook ? RandomCodebook(50, 192, 64)
                                 : RandomQuantized(50, 192, bits, 64, false));
    const auto x = RandomFloats(kTokens * 192, 1);
    for (const cpu::PackedKernel& kernel : RunnableKernels()) {
      std::vector<float> alone = PoisonedFloats(kTokens * 50);
      for (int64_t t = 0; t < kTokens; ++t) {
        const PackedMatmulParams params{.n_tokens = 1,
                                        .x = x.data() + t * 192,
                                        .x_stride = 192,
                                        .weights = &weights,
                                        .y = alone.data() + t * 50,
                                        .y_stride = 50};
        ASSERT_OK(cpu::PackedMatmulWith(kernel, {&params, 1}, {}));
      }
      for (const int64_t n_tokens : {2, 3, 7, 8, 12, 64, 300}) {
        std::vector<float> y = PoisonedFloats(n_tokens * 50);
        const PackedMatmulParams params{.n_tokens = n_tokens,
                                        .x = x.data(),
                                        .x_stride = 192,
                                        .weights = &weights,
                                        .y = y.data(),
                                        .y_stride = 50};
        ASSERT_OK(cpu::PackedMatmulWith(kernel, {&params, 1}, {}));
        EXPECT_EQ(0, std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)))
            << kernel.name << ", " << bits << " bits, batch of " << n_tokens;
      }
    }
  }
}

TEST(PackedMatmulTest, MatricesTogetherEqualEachAlone) {
  const std::vector<PackedMatrix> weights = {
      Packed(RandomQuantized(64, 192, 4, 64, false)),
      Packed(RandomQuantized(33, 192, 2, 192, true)), Packed(RandomCodebook(40, 192, 32)),
      Packed(RandomFloatZeros(24, 192, 3, 64)), Packed(RandomQuantized(16, 192, 8, 32, false))};
  for (const int64_t n_tokens : {1, 40}) {
    const auto x = RandomFloats(n_tokens * 192, 1);
    std::vector<std::vector<float>> together;
    std::vector<PackedMatmulParams> params;
    for (const PackedMatrix& w : weights) together.push_back(PoisonedFloats(n_tokens * w.rows()));
    for (size_t i = 0; i < weights.size(); ++i) {
      params.push_back({.n_tokens = n_tokens,
                        .x = x.data(),
                        .x_stride = 192,
                        .weights = &weights[i],
                        .y = together[i].data(),
                        .y_stride = weights[i].rows()});
    }
    ThreadPool pool(2);
    ASSERT_OK(PackedMatmulBatch(params, {.pool = &pool}));
    for (size_t i = 0; i < weights.size(); ++i) {
      std::vector<float> alone = PoisonedFloats(n_tokens * weights[i].rows());
      params[i].y = alone.data();
      ASSERT_OK(PackedMatmul(params[i], {}));
      EXPECT_EQ(0, std::memcmp(alone.data(), together[i].data(), alone.size() * sizeof(float)));
    }
  }
}

TEST(PackedMatmulTest, TinyActivationsAreZeroAndBadOnesNan) {
  const PackedMatrix weights = Packed(RandomQuantized(16, 64, 4, 32, false));
  std::vector<float> x(3 * 64, 1e-38f);
  x[64 + 40] = std::numeric_limits<float>::quiet_NaN();
  x[128 + 3] = -std::numeric_limits<float>::infinity();
  for (const Backend backend : {Backend::kRef, Backend::kCpu}) {
    std::vector<float> y(3 * 16, 7.0f);
    ASSERT_OK(PackedMatmul({.n_tokens = 3,
                            .x = x.data(),
                            .x_stride = 64,
                            .weights = &weights,
                            .y = y.data(),
                            .y_stride = 16},
                           {.backend = backend}));
    for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(y[i], 0);
    for (int64_t i = 16; i < 48; ++i) EXPECT_TRUE(std::isnan(y[i])) << i;
  }
}

// Half a step of 127 on normal activations: the error that rounding them adds to a product. A
// figure of quality, not of correctness: 32 values keep it near 0.5 %.
TEST(PackedMatmulTest, ErrorOfRoundingActivations) {
  const PackedMatrix weights = Packed(RandomQuantized(256, 1024, 4, 64, true));
  const Matrix dense = weights.Dequantize();
  const auto x = RandomFloats(8 * 1024, 1);
  std::vector<float> exact(8 * 256);
  std::vector<float> rounded(8 * 256);
  ASSERT_OK(Matmul({.n_tokens = 8,
                    .in = 1024,
                    .out = 256,
                    .x = x.data(),
                    .x_stride = 1024,
                    .weights = dense.data(),
                    .y = exact.data(),
                    .y_stride = 256},
                   {.backend = Backend::kRef}));
  ASSERT_OK(PackedMatmul({.n_tokens = 8,
                          .x = x.data(),
                          .x_stride = 1024,
                          .weights = &weights,
                          .y = rounded.data(),
                          .y_stride = 256},
                         {}));
  const testing::Comparison comparison = testing::CompareTensors(rounded, exact);
  RecordProperty("relative_rms_error", std::to_string(std::sqrt(comparison.nmse)));
  EXPECT_LT(std::sqrt(comparison.nmse), 0.007);
  EXPECT_GT(std::sqrt(comparison.nmse), 0.003);
}

}  // namespace
}  // namespace walsh::kernels
