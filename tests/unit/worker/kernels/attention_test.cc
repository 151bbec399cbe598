#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "tests/unit/worker/kernels/kernel_harness.h"

namespace walsh::kernels {
namespace {

using testing::PoisonedFloats;
using testing::RandomFloats;

struct AttentionCase {
  int64_t n_new, n_past, n_heads, n_kv_heads, head_dim;
  int64_t padding = 0;
  int64_t window = 0;
};

struct AttentionInputs {
  explicit AttentionInputs(const AttentionCase& c, uint64_t stream = 0)
      : q(RandomFloats(c.n_new * (c.n_heads * c.head_dim + c.padding), stream + 1)),
        k(RandomFloats((c.n_past + c.n_new) * (c.n_kv_heads * c.head_dim + c.padding), stream + 2)),
        v(RandomFloats((c.n_past + c.n_new) * (c.n_kv_heads * c.head_dim + c.padding),
                       stream + 3)) {}
  std::vector<float> q, k, v;
};

AttentionParams Params(const AttentionCase& c, const AttentionInputs& inputs, float* y) {
  return {.n_new = c.n_new,
          .n_past = c.n_past,
          .n_heads = c.n_heads,
          .n_kv_heads = c.n_kv_heads,
          .head_dim = c.head_dim,
          .window = c.window,
          .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
          .q = inputs.q.data(),
          .q_stride = c.n_heads * c.head_dim + c.padding,
          .k = inputs.k.data(),
          .v = inputs.v.data(),
          .kv_stride = c.n_kv_heads * c.head_dim + c.padding,
          .y = y,
          .y_stride = c.n_heads * c.head_dim};
}

void TestAttention(const AttentionCase& c) {
  SCOPED_TRACE(::testing::Message()
               << c.n_new << " new, " << c.n_past << " past, " << c.n_heads << "/" << c.n_kv_heads
               << " heads of " << c.head_dim << ", window " << c.window);
  const AttentionInputs inputs(c);
  ExpectLikeReference(
      PoisonedFloats(c.n_new * c.n_heads * c.head_dim),
      [&](const Stream& stream, float* y) { return Attention(Params(c, inputs, y), stream); });
}

// The same keys and values in blocks that lie apart and in no order.
struct PagedInputs {
  PagedInputs(const AttentionCase& c, const AttentionInputs& inputs)
      : width(c.n_kv_heads * c.head_dim + c.padding) {
    const int64_t n_keys = c.n_past + c.n_new;
    const int64_t n_blocks = (n_keys + kKvBlockTokens - 1) / kKvBlockTokens;
    for (int64_t i = 0; i < n_blocks; ++i) blocks.push_back(static_cast<int32_t>(2 * i + 1));
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
    k = PoisonedFloats((2 * n_blocks + 1) * stride());
    v = k;
    for (int64_t row = 0; row < n_keys; ++row) {
      const int64_t to = blocks[row / kKvBlockTokens] * stride() + row % kKvBlockTokens * width;
      std::copy_n(inputs.k.begin() + row * width, width, k.begin() + to);
      std::copy_n(inputs.v.begin() + row * width, width, v.begin() + to);
    }
  }
  int64_t stride() const { return kKvBlockTokens * width + 7; }
  void Use(AttentionParams& params) const {
    params.k = k.data();
    params.v = v.data();
    params.blocks = blocks.data();
    params.block_stride = stride();
  }
  int64_t width;
  std::vector<int32_t> blocks;
  std::vector<float> k, v;
};

// Bytes with each backend, since only the place of keys and values differs.
TEST(AttentionTest, PagedGivesTheSameBits) {
  for (const int64_t n_past : {0, 1, 15, 16, 17, 31, 33, 127, 128, 300}) {
    for (const int64_t n_new : {1, 2, 16, 150, 170}) {
      for (const int64_t window : {0, 20, 130}) {
        const AttentionCase c = {.n_new = n_new,
                                 .n_past = n_past,
                                 .n_heads = 6,
                                 .n_kv_heads = 2,
                                 .head_dim = 24,
                                 .padding = 3,
                                 .window = window};
        SCOPED_TRACE(::testing::Message()
                     << n_new << " new, " << n_past << " past, window " << window);
        const AttentionInputs inputs(c);
        const PagedInputs paged(c, inputs);
        for (const Backend backend : {Backend::kRef, Backend::kCpu}) {
          std::vector<float> expected = PoisonedFloats(n_new * 6 * 24);
          ASSERT_OK(Attention(Params(c, inputs, expected.data()), {.backend = backend}));
          std::vector<float> y = PoisonedFloats(n_new * 6 * 24);
          AttentionParams params = Params(c, inputs, y.data());
          paged.Use(params);
          ASSERT_OK(Attention(params, {.backend = backend}));
          ASSERT_EQ(0, std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)));
        }
      }
    }
  }
}

TEST(AttentionTest, EveryHeadWidth) {
  for (const int64_t head_dim : {1, 2, 3, 5, 6, 8, 13, 16, 31, 32, 33, 48, 64, 80, 96, 128, 256}) {
    TestAttention({.n_new = 5,
                   .n_past = 3,
                   .n_heads = 4,
                   .n_kv_heads = 2,
                   .head_dim = head_dim,
                   .padding = 3});
  }
}

TEST(AttentionTest, EveryHeadCount) {
  for (const auto& [heads, kv] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 1}, {9, 3}, {8, 4}, {8, 8}, {32, 2}, {40, 1}}) {
    TestAttention({.n_new = 1, .n_past = 40, .n_heads = heads, .n_kv_heads = kv, .head_dim = 16});
    TestAttention({.n_new = 19, .n_past = 0, .n_heads = heads, .n_kv_heads = kv, .head_dim = 16});
  }
}

// Around the borders of key blocks (32) and chunks (128).
TEST(AttentionTest, EveryLength) {
  for (const int64_t n_past :
       {0, 1, 30, 31, 32, 33, 64, 126, 127, 128, 129, 255, 256, 257, 511, 512, 700}) {
    for (const int64_t n_new : {1, 2, 11, 66}) {
      TestAttention(
          {.n_new = n_new, .n_past = n_past, .n_heads = 6, .n_kv_heads = 2, .head_dim = 8});
    }
  }
  TestAttention({.n_new = 600, .n_past = 0, .n_heads = 2, .n_kv_heads = 1, .head_dim = 8});
  TestAttention({.n_new = 0, .n_past = 5, .n_heads = 2, .n_kv_heads = 1, .head_dim = 8});
}

// Windows around the borders of key blocks and chunks, shorter and longer than what is there.
TEST(AttentionTest, EveryWindow) {
  for (const int64_t window : {1, 2, 31, 32, 33, 127, 128, 129, 200, 384, 1000}) {
    for (const int64_t n_past : {0, 1, 127, 128, 300, 513}) {
      for (const int64_t n_new : {1, 13, 70}) {
        TestAttention({.n_new = n_new,
                       .n_past = n_past,
                       .n_heads = 6,
                       .n_kv_heads = 2,
                       .head_dim = 8,
                       .window = window});
      }
    }
    TestAttention({.n_new = 600,
                   .n_past = 0,
                   .n_heads = 2,
                   .n_kv_heads = 1,
                   .head_dim = 8,
                   .window = window});
  }
}

// Keys and values before the window are not looked at.
TEST(AttentionTest, WhatIsBeforeTheWindowDoesNotMatter) {
  const AttentionCase c = {
      .n_new = 3, .n_past = 300, .n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .window = 40};
  AttentionInputs inputs(c);
  std::vector<float> expected = PoisonedFloats(3 * 4 * 16);
  ASSERT_OK(Attention(Params(c, inputs, expected.data()), {}));
  const int64_t first_seen = 300 + 1 - 40;
  std::fill_n(inputs.k.begin(), first_seen * 2 * 16, 1e4f);
  std::fill_n(inputs.v.begin(), first_seen * 2 * 16, 1e4f);
  std::vector<float> y = PoisonedFloats(3 * 4 * 16);
  ASSERT_OK(Attention(Params(c, inputs, y.data()), {}));
  EXPECT_EQ(y, expected);
}

// Scores of ±100: the softmax must not overflow, and chunks with lower maxima must be scaled down.
TEST(AttentionTest, ExtremeScores) {
  const AttentionCase c = {
      .n_new = 40, .n_past = 500, .n_heads = 3, .n_kv_heads = 1, .head_dim = 16};
  AttentionInputs inputs(c);
  for (float& q : inputs.q) q *= 100.0f;
  ExpectLikeReference(
      PoisonedFloats(c.n_new * c.n_heads * c.head_dim),
      [&](const Stream& stream, float* y) { return Attention(Params(c, inputs, y), stream); },
      {.max_abs = 1e-2, .max_rel = 1e-2, .nmse = 1e-7});
}

// A prompt in one piece, in pieces, and token by token gives the same bits.
class CutPromptTest : public ::testing::TestWithParam<int64_t> {};

TEST_P(CutPromptTest, GivesTheSameBits) {
  const AttentionCase whole = {.n_new = 330,
                               .n_past = 0,
                               .n_heads = 6,
                               .n_kv_heads = 2,
                               .head_dim = 64,
                               .window = GetParam()};
  const AttentionInputs inputs(whole);
  std::vector<float> expected = PoisonedFloats(330 * 6 * 64);
  ASSERT_OK(Attention(Params(whole, inputs, expected.data()), {}));
  for (const int64_t step : {1, 7, 128}) {
    std::vector<float> y = PoisonedFloats(330 * 6 * 64);
    for (int64_t first = 0; first < 330; first += step) {
      AttentionParams params = Params(whole, inputs, y.data() + first * 6 * 64);
      params.n_past = first;
      params.n_new = std::min(step, 330 - first);
      params.q += first * params.q_stride;
      ASSERT_OK(Attention(params, {}));
    }
    EXPECT_EQ(0, std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)))
        << "in pieces of " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Windows, CutPromptTest, ::testing::Values(0, 20, 100, 128, 200));

TEST(AttentionTest, BatchEqualsEachAlone) {
  const std::vector<AttentionCase> cases = {
      {.n_new = 1, .n_past = 300, .n_heads = 6, .n_kv_heads = 2, .head_dim = 64},
      {.n_new = 33, .n_past = 5, .n_heads = 6, .n_kv_heads = 2, .head_dim = 64},
      {.n_new = 1, .n_past = 0, .n_heads = 6, .n_kv_heads = 2, .head_dim = 64}};
  std::vector<AttentionInputs> inputs;
  std::vector<std::vector<float>> together;
  std::vector<AttentionParams> params;
  for (size_t i = 0; i < cases.size(); ++i) {
    inputs.emplace_back(cases[i], 10 * i);
    together.push_back(PoisonedFloats(cases[i].n_new * 6 * 64));
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    params.push_back(Params(cases[i], inputs[i], together[i].data()));
  }
  ThreadPool pool(2);
  ASSERT_OK(AttentionBatch(params, {.pool = &pool}));
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<float> alone = PoisonedFloats(cases[i].n_new * 6 * 64);
    ASSERT_OK(Attention(Params(cases[i], inputs[i], alone.data()), {}));
    EXPECT_EQ(0, std::memcmp(alone.data(), together[i].data(), alone.size() * sizeof(float)))
        << "sequence " << i;
  }
}

}  // namespace
}  // namespace walsh::kernels
