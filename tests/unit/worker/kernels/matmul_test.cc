#include <gtest/gtest.h>

#include <cmath>

#include "tests/unit/worker/kernels/kernel_harness.h"

namespace walsh::kernels {
namespace {

using testing::PoisonedFloats;
using testing::RandomFloats;

// Sums of n products of normal values: errors grow with the root of n.
testing::CompareLimits ProductLimits(int64_t n) {
  const double size = std::sqrt(static_cast<double>(n) + 1);
  return {.max_abs = 1e-5 * size, .max_rel = 1e-4 * size, .nmse = 1e-10};
}

struct MatmulCase {
  int64_t n_tokens, in, out;
  bool bias = false;
  bool accumulate = false;
  int64_t padding = 0;       // of the strides
  int64_t misalignment = 0;  // of every pointer, in floats
};

void TestMatmul(const MatmulCase& c) {
  SCOPED_TRACE(::testing::Message() << c.n_tokens << " x " << c.in << " -> " << c.out << " bias "
                                    << c.bias << " accumulate " << c.accumulate << " padding "
                                    << c.padding << " misalignment " << c.misalignment);
  const int64_t x_stride = c.in + c.padding;
  const int64_t y_stride = c.out + c.padding;
  const auto x = RandomFloats(c.n_tokens * x_stride + c.misalignment, 1);
  const auto weights = RandomFloats(c.out * c.in + c.misalignment, 2);
  const auto bias = RandomFloats(c.out, 3);
  const int64_t y_size = c.n_tokens * y_stride + c.misalignment;
  // Between the rows nothing may be written; NaN there would never compare as close.
  std::vector<float> initial = c.accumulate ? RandomFloats(y_size, 4) : PoisonedFloats(y_size);
  for (int64_t i = 0; i < y_size; ++i) {
    if (i < c.misalignment || (i - c.misalignment) % std::max<int64_t>(1, y_stride) >= c.out) {
      initial[static_cast<size_t>(i)] = 7.0f;
    }
  }
  ExpectLikeReference(
      initial,
      [&](const Stream& stream, float* y) {
        return Matmul({.n_tokens = c.n_tokens,
                       .in = c.in,
                       .out = c.out,
                       .x = x.data() + c.misalignment,
                       .x_stride = x_stride,
                       .weights = weights.data() + c.misalignment,
                       .bias = c.bias ? bias.data() : nullptr,
                       .y = y + c.misalignment,
                       .y_stride = y_stride,
                       .accumulate = c.accumulate},
                      stream);
      },
      ProductLimits(c.in));
}

TEST(MatmulTest, EveryWidth) {
  for (const int64_t in : TestSizes()) {
    TestMatmul({.n_tokens = 1, .in = in, .out = 5});
    TestMatmul({.n_tokens = 7, .in = in, .out = 5, .padding = 3});
  }
  for (const int64_t out : TestSizes()) {
    TestMatmul({.n_tokens = 3, .in = 19, .out = out, .bias = true});
    TestMatmul({.n_tokens = 9, .in = 19, .out = out, .bias = true});
  }
}

TEST(MatmulTest, EveryTokenCount) {
  for (const int64_t n_tokens : {0, 1, 2, 3, 4, 5, 6, 17, 255, 256, 257, 521}) {
    TestMatmul({.n_tokens = n_tokens, .in = 33, .out = 41, .bias = true});
    TestMatmul({.n_tokens = n_tokens, .in = 33, .out = 41, .accumulate = true});
  }
}

TEST(MatmulTest, StridesAndMisalignments) {
  for (const int64_t misalignment : {0, 1, 3}) {
    for (const int64_t n_tokens : {1, 4, 30}) {
      TestMatmul({.n_tokens = n_tokens,
                  .in = 67,
                  .out = 29,
                  .bias = true,
                  .accumulate = true,
                  .padding = 5,
                  .misalignment = misalignment});
    }
  }
}

TEST(MatmulTest, ModelShapes) {
  TestMatmul({.n_tokens = 64, .in = 576, .out = 1536});
  TestMatmul({.n_tokens = 64, .in = 1536, .out = 576});
  TestMatmul({.n_tokens = 1, .in = 64, .out = 49152});
  TestMatmul({.n_tokens = 300, .in = 172, .out = 64});
}

TEST(CrossGramTest, AddsAllOfTheProduct) {
  for (const int64_t dim : {1, 2, 17, 191, 192, 193, 389}) {
    for (const int64_t n_tokens : {0, 1, 33}) {
      SCOPED_TRACE(::testing::Message() << n_tokens << " x " << dim);
      const int64_t x_stride = dim + 3, y_stride = dim + 1;
      const auto x = RandomFloats(n_tokens * x_stride, 1);
      const auto y = RandomFloats(n_tokens * y_stride, 2);
      ExpectLikeReference(
          RandomFloats(dim * dim, 3),
          [&](const Stream& stream, float* c) {
            return CrossGram({.n_tokens = n_tokens,
                              .dim = dim,
                              .x = x.data(),
                              .x_stride = x_stride,
                              .y = y.data(),
                              .y_stride = y_stride,
                              .c = c},
                             stream);
          },
          ProductLimits(n_tokens));
    }
  }
}

TEST(GramTest, AddsBothTriangles) {
  for (const int64_t dim : {1, 2, 17, 172, 191, 192, 193, 389, 576}) {
    for (const int64_t n_tokens : {0, 1, 33}) {
      SCOPED_TRACE(::testing::Message() << n_tokens << " x " << dim);
      const int64_t stride = dim + 3;
      const auto x = RandomFloats(n_tokens * stride, 1);
      // H is symmetric before, too.
      auto initial = RandomFloats(dim * dim, 2);
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t j = 0; j < i; ++j) initial[i * dim + j] = initial[j * dim + i];
      }
      const auto h = ExpectLikeReference(
          initial,
          [&](const Stream& stream, float* y) {
            return Gram(
                {.n_tokens = n_tokens, .dim = dim, .x = x.data(), .x_stride = stride, .h = y},
                stream);
          },
          ProductLimits(n_tokens));
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t j = 0; j < i; ++j) ASSERT_EQ(h[i * dim + j], h[j * dim + i]);
      }
    }
  }
}

TEST(SubtractProductTest, LikeReference) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{0, 5, 5},
                                {5, 0, 5},
                                {5, 7, 0},
                                {1, 1, 1},
                                {13, 17, 19},
                                {191, 385, 128},
                                {576, 448, 64}}) {
    SCOPED_TRACE(::testing::Message() << m << " x " << k << " x " << n);
    const auto a = RandomFloats(m * (k + 2), 1);
    const auto b = RandomFloats(k * (n + 1), 2);
    ExpectLikeReference(
        RandomFloats(m * (n + 3), 3),
        [&, m = m, n = n, k = k](const Stream& stream, float* c) {
          return SubtractProduct({.m = m,
                                  .n = n,
                                  .k = k,
                                  .a = a.data(),
                                  .a_stride = k + 2,
                                  .b = b.data(),
                                  .b_stride = n + 1,
                                  .c = c,
                                  .c_stride = n + 3},
                                 stream);
        },
        ProductLimits(k));
  }
}

}  // namespace
}  // namespace walsh::kernels
