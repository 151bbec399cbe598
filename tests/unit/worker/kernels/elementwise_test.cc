// RmsNorm, Rope, SiluMultiply, GeluMultiply, Add, CrossEntropy and KlDivergence against their
// references.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "tests/unit/worker/kernels/kernel_harness.h"

namespace walsh::kernels {
namespace {

using testing::PoisonedFloats;
using testing::RandomFloats;

TEST(RmsNormTest, EverySizeAndMisalignment) {
  for (const int64_t dim : TestSizes()) {
    for (const int64_t misalignment : {0, 1, 3}) {
      for (const bool weighted : {false, true}) {
        SCOPED_TRACE(::testing::Message() << "dim " << dim << " misalignment " << misalignment);
        const int64_t n_tokens = 3;
        const auto x = RandomFloats(n_tokens * dim + misalignment, 1);
        const auto weight = RandomFloats(dim + misalignment, 2);
        ExpectLikeReference(PoisonedFloats(n_tokens * dim),
                            [&](const Stream& stream, float* y) {
                              return RmsNorm(
                                  {.n_tokens = n_tokens,
                                   .dim = dim,
                                   .x = x.data() + misalignment,
                                   .weight = weighted ? weight.data() + misalignment : nullptr,
                                   .eps = 1e-5f,
                                   .y = y},
                                  stream);
                            },
                            {.max_abs = 1e-5, .max_rel = 1e-5, .nmse = 1e-12});
      }
    }
  }
}

TEST(RmsNormTest, InPlaceAndManyRows) {
  ExpectLikeReference(RandomFloats(200 * 576, 1), [](const Stream& stream, float* y) {
    return RmsNorm({.n_tokens = 200, .dim = 576, .x = y, .eps = 1e-6f, .y = y}, stream);
  });
}

TEST(RopeTest, EveryHeadWidth) {
  for (const int64_t head_dim : {0, 2, 4, 6, 8, 14, 16, 22, 34, 64, 66, 80, 128, 256}) {
    for (const int64_t padding : {0, 5}) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim);
      // Positions up to the longest context: the angle must not lose what a float cannot hold.
      const std::vector<int32_t> positions = {0, 1, 2, 511, 8191, 131071, 4194303};
      std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
      for (int64_t i = 0; i < head_dim / 2; ++i) {
        frequencies[i] =
            std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(head_dim));
      }
      const int64_t n_heads = 3;
      const int64_t stride = n_heads * head_dim + padding;
      ExpectLikeReference(RandomFloats(static_cast<int64_t>(positions.size()) * stride, 1),
                          [&](const Stream& stream, float* x) {
                            return Rope({.n_tokens = static_cast<int64_t>(positions.size()),
                                         .n_heads = n_heads,
                                         .head_dim = head_dim,
                                         .positions = positions.data(),
                                         .inverse_frequencies = frequencies.data(),
                                         .x = x,
                                         .x_stride = stride},
                                        stream);
                          },
                          {.max_abs = 2e-6, .max_rel = 1e-5, .nmse = 1e-12});
    }
  }
}

TEST(SiluMultiplyTest, EverySizeAndMisalignment) {
  for (const int64_t dim : TestSizes()) {
    for (const int64_t misalignment : {0, 1, 3}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " misalignment " << misalignment);
      const int64_t stride = dim + 2;
      const auto gate = RandomFloats(3 * stride + misalignment, 1, 4.0f);
      const auto up = RandomFloats(3 * stride + misalignment, 2);
      std::vector<float> initial(static_cast<size_t>(3 * stride), 7.0f);
      for (int64_t t = 0; t < 3; ++t) {
        std::fill_n(initial.begin() + t * stride, dim, std::numeric_limits<float>::quiet_NaN());
      }
      ExpectLikeReference(initial, [&](const Stream& stream, float* y) {
        return SiluMultiply({.n_tokens = 3,
                             .dim = dim,
                             .gate = gate.data() + misalignment,
                             .gate_stride = stride,
                             .up = up.data() + misalignment,
                             .up_stride = stride,
                             .y = y,
                             .y_stride = stride},
                            stream);
      });
    }
  }
}

TEST(SiluMultiplyTest, ExtremeGates) {
  const std::vector<float> gate = {-1e30f, -1000, -104, -89,   -88,    -20,     -0.0f, 0, 20,
                                   88,     89,    104,  1e30f, 1e-30f, -1e-30f, 1,     -1};
  const std::vector<float> up(gate.size(), 1.0f);
  const auto n = static_cast<int64_t>(gate.size());
  ExpectLikeReference(PoisonedFloats(n),
                      [&](const Stream& stream, float* y) {
                        return SiluMultiply({.n_tokens = 1,
                                             .dim = n,
                                             .gate = gate.data(),
                                             .gate_stride = n,
                                             .up = up.data(),
                                             .up_stride = n,
                                             .y = y,
                                             .y_stride = n},
                                            stream);
                      },
                      {.max_abs = 1e24, .max_rel = 1e-6, .nmse = 1e-12});
}

TEST(GeluMultiplyTest, EverySizeAndMisalignment) {
  for (const int64_t dim : TestSizes()) {
    for (const int64_t misalignment : {0, 1, 3}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " misalignment " << misalignment);
      const int64_t stride = dim + 2;
      const auto gate = RandomFloats(3 * stride + misalignment, 1, 4.0f);
      const auto up = RandomFloats(3 * stride + misalignment, 2);
      std::vector<float> initial(static_cast<size_t>(3 * stride), 7.0f);
      for (int64_t t = 0; t < 3; ++t) {
        std::fill_n(initial.begin() + t * stride, dim, std::numeric_limits<float>::quiet_NaN());
      }
      ExpectLikeReference(initial, [&](const Stream& stream, float* y) {
        return GeluMultiply({.n_tokens = 3,
                             .dim = dim,
                             .gate = gate.data() + misalignment,
                             .gate_stride = stride,
                             .up = up.data() + misalignment,
                             .up_stride = stride,
                             .y = y,
                             .y_stride = stride},
                            stream);
      });
    }
  }
}

TEST(GeluMultiplyTest, ExtremeGates) {
  const std::vector<float> gate = {-1e30f, -1000, -104, -89,   -88,    -20,     -0.0f, 0, 20,
                                   88,     89,    104,  1e30f, 1e-30f, -1e-30f, 1,     -1};
  const std::vector<float> up(gate.size(), 1.0f);
  const auto n = static_cast<int64_t>(gate.size());
  ExpectLikeReference(PoisonedFloats(n),
                      [&](const Stream& stream, float* y) {
                        return GeluMultiply({.n_tokens = 1,
                                             .dim = n,
                                             .gate = gate.data(),
                                             .gate_stride = n,
                                             .up = up.data(),
                                             .up_stride = n,
                                             .y = y,
                                             .y_stride = n},
                                            stream);
                      },
                      {.max_abs = 1e24, .max_rel = 1e-6, .nmse = 1e-12});
}

TEST(AddTest, EverySize) {
  std::vector<int64_t> sizes = TestSizes();
  sizes.push_back(16384);
  sizes.push_back(50021);
  for (const int64_t n : sizes) {
    const auto x = RandomFloats(n + 1, 1);
    ExpectLikeReference(RandomFloats(n, 2),
                        [&](const Stream& stream, float* y) {
                          return Add({.n = n, .x = x.data() + 1, .y = y}, stream);
                        },
                        {.max_abs = 0, .max_rel = 0, .nmse = 0});
  }
}

TEST(CrossEntropyTest, LikeReference) {
  for (const int64_t vocab : {1, 2, 7, 8, 15, 16, 17, 33, 512, 2048, 49152}) {
    SCOPED_TRACE(::testing::Message() << "vocab " << vocab);
    const int64_t n_tokens = 5;
    const auto logits = RandomFloats(n_tokens * vocab, 1, 6.0f);
    std::vector<int32_t> targets;
    for (int64_t t = 0; t < n_tokens; ++t) {
      targets.push_back(static_cast<int32_t>(t * 7919 % vocab));
    }
    std::vector<double> expected(static_cast<size_t>(n_tokens), NAN);
    CrossEntropyParams params{.n_tokens = n_tokens,
                              .vocab = vocab,
                              .logits = logits.data(),
                              .targets = targets.data(),
                              .loss = expected.data()};
    ASSERT_OK(CrossEntropy(params, {.backend = Backend::kRef}));
    for (const int n_threads : {1, 2, 3}) {
      ThreadPool pool(n_threads);
      std::vector<double> loss(static_cast<size_t>(n_tokens), NAN);
      params.loss = loss.data();
      ASSERT_OK(CrossEntropy(params, {.pool = &pool}));
      for (int64_t t = 0; t < n_tokens; ++t) {
        EXPECT_NEAR(loss[t], expected[t], 1e-6) << "token " << t << ", " << n_threads << " threads";
      }
    }
  }
}

TEST(CrossEntropyTest, LargeLogits) {
  const std::vector<float> logits = {1e30f, 0, -1e30f};
  const std::vector<int32_t> targets = {0};
  double loss = NAN;
  ASSERT_OK(CrossEntropy({.n_tokens = 1,
                          .vocab = 3,
                          .logits = logits.data(),
                          .targets = targets.data(),
                          .loss = &loss},
                         {}));
  EXPECT_EQ(loss, 0);
}

struct Divergence {
  std::vector<double> divergence;
  std::vector<int32_t> agrees;
};

Divergence KlOf(const std::vector<float>& p, const std::vector<float>& q, int64_t n_tokens,
                const Stream& stream) {
  const auto n = static_cast<size_t>(n_tokens);
  Divergence result{std::vector<double>(n, NAN), std::vector<int32_t>(n, -1)};
  EXPECT_OK(KlDivergence({.n_tokens = n_tokens,
                          .vocab = static_cast<int64_t>(p.size()) / n_tokens,
                          .reference = p.data(),
                          .logits = q.data(),
                          .divergence = result.divergence.data(),
                          .agrees = result.agrees.data()},
                         stream));
  return result;
}

TEST(KlDivergenceTest, LikeReference) {
  for (const int64_t vocab : {1, 2, 7, 8, 15, 16, 17, 33, 512, 2048, 49152}) {
    SCOPED_TRACE(::testing::Message() << "vocab " << vocab);
    const int64_t n_tokens = 5;
    const auto p = RandomFloats(n_tokens * vocab, 1, 6.0f);
    // From far away to as near as eight bits are.
    for (const float distance : {3.0f, 0.1f, 0.003f}) {
      std::vector<float> q = RandomFloats(n_tokens * vocab, 2, distance);
      for (size_t i = 0; i < q.size(); ++i) q[i] += p[i];
      const Divergence expected = KlOf(p, q, n_tokens, {.backend = Backend::kRef});
      for (const int n_threads : {1, 3}) {
        ThreadPool pool(n_threads);
        const Divergence found = KlOf(p, q, n_tokens, {.pool = &pool});
        EXPECT_EQ(found.agrees, expected.agrees);
        for (size_t t = 0; t < expected.divergence.size(); ++t) {
          EXPECT_NEAR(found.divergence[t], expected.divergence[t],
                      1e-6 * expected.divergence[t] + 1e-7)
              << "token " << t << ", " << n_threads << " threads";
        }
      }
    }
  }
}

TEST(KlDivergenceTest, OfAModelFromItselfIsNothing) {
  const auto p = RandomFloats(3 * 1000, 1, 6.0f);
  const Divergence found = KlOf(p, p, 3, {});
  EXPECT_EQ(found.divergence, std::vector<double>(3, 0.0));
  EXPECT_EQ(found.agrees, std::vector<int32_t>(3, 1));
}

// By hand: p = (1/2, 1/2), q = (1/4, 3/4): KL = ln(2) / 2 + ln(2/3) / 2.
TEST(KlDivergenceTest, OfTwoTokens) {
  const std::vector<float> p = {5, 5};
  const std::vector<float> q = {0, std::log(3.0f)};
  for (const Backend backend : {Backend::kRef, Backend::kCpu}) {
    const Divergence found = KlOf(p, q, 1, {.backend = backend});
    EXPECT_NEAR(found.divergence[0], 0.5 * std::log(4.0 / 3.0), 1e-7);
    EXPECT_EQ(found.agrees[0], 0) << "of equals, the first counts";
  }
}

}  // namespace
}  // namespace walsh::kernels
