// Products of many tokens with quantized weights, and the tiles that they read, against double;
// every cut of the work; what is written and how.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/low_bit_fixture.h"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/token_tiles.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

// ‖y − reference‖ / ‖reference‖: weights are rounded to bf16, by at most 2^-9 each, twice where
// zeros have fractions; one column is so large that its weights decide where there are few.
constexpr double kWeightsLimit = 4e-3;
// And activations, too; or the result.
constexpr double kBothLimit = 5e-3;
constexpr int64_t kTokens = 150;
constexpr LowBitGemmTuning kCuts[] = {{16, 1},  {16, 3},  {32, 2},  {64, 1}, {64, 4},
                                      {128, 1}, {128, 2}, {256, 1}, {256, 2}};
constexpr Width kFourBits{4, StoredGrid::kGptq};

struct Tiles {
  DeviceBuffer<__nv_bfloat16> buffer;
  TokenTiles tiles;
};

// Column `col` of `token` (token_tiles.h), found by what is said there.
size_t PlaceInTiles(const TokenTiles& tiles, int64_t token, int64_t col) {
  const int64_t within = col % 16 / 2 + col % 2 * 8;
  const int64_t chunk = (col % 64 / 16 * 2 + within / 8) ^ (token % 8);
  return static_cast<size_t>((col / 64 * tiles.capacity + token) * 64 + chunk * 8 + within % 8);
}

class LowBitGemmGpuTest : public LowBitGpuTest {
 protected:
  void SetUp() override {
    LowBitGpuTest::SetUp();
    if (!IsSkipped() && !HasLowBitGemm()) GTEST_SKIP() << "no device of compute 9.0a";
  }

  // Poisoned: NaN wherever nothing is written.
  Tiles EmptyTiles(int64_t n_tokens, int64_t cols) {
    Tiles t;
    const int64_t capacity = TokenTilesCapacity(n_tokens);
    t.buffer = Poisoned<__nv_bfloat16>(TokenTilesSize(capacity, cols));
    t.tiles = {.data = t.buffer.data(), .capacity = capacity, .cols = cols};
    return t;
  }
  // `params` lacks the tiles and the stream.
  Tiles MakeTiles(MakeTokenTilesParams params, int64_t cols) {
    Tiles t = EmptyTiles(params.n_tokens, cols);
    params.tiles = t.tiles;
    params.stream = context().stream();
    EXPECT_OK(MakeTokenTiles(params));
    return t;
  }
  std::vector<float> ReadTiles(const Tiles& t, int64_t n_tokens) {
    const std::vector<__nv_bfloat16> raw = Download(t.buffer);
    std::vector<float> x;
    for (int64_t token = 0; token < n_tokens; ++token) {
      for (int64_t col = 0; col < t.tiles.cols; ++col) {
        x.push_back(__bfloat162float(raw[PlaceInTiles(t.tiles, token, col)]));
      }
    }
    return x;
  }
  std::vector<float> Multiply(const ServingMatrix& weights, const TokenTiles& x, int64_t n_tokens,
                              const LowBitGemmTuning& tuning = {}) {
    auto y = Poisoned<float>(n_tokens * weights.shape().rows);
    EXPECT_OK(LowBitGemm({.n_tokens = n_tokens,
                          .weights = &weights,
                          .x = x,
                          .y_float = y.data(),
                          .tuning = tuning,
                          .stream = context().stream()}));
    return Download(y);
  }
};

class LowBitGemmWidthGpuTest : public LowBitGemmGpuTest,
                               public ::testing::WithParamInterface<Width> {};

TEST_P(LowBitGemmWidthGpuTest, ProductsAreThoseOfDouble) {
  for (const Shape& s : ShapesOf(GetParam())) {
    SCOPED_TRACE(absl::StrCat(s.rows, " x ", s.cols, ", group ", s.group_size));
    const QuantizedMatrix m = RandomQuantized(s.rows, s.cols, s.group_size, GetParam(), 2);
    const ServingMatrix serving = Build({m});
    const Activations x = RandomActivations(kTokens, s.cols, 3);
    const Tiles tiles = MakeTiles({.n_tokens = kTokens, .x = x.device.data()}, s.cols);
    const std::vector<double> expected = Reference(m, x.host, kTokens);
    for (const int64_t n_tokens : {int64_t{1}, int64_t{13}, int64_t{64}, kTokens}) {
      const std::vector<double> some(expected.begin(), expected.begin() + n_tokens * s.rows);
      EXPECT_LT(RelativeError(Multiply(serving, tiles.tiles, n_tokens), some), kWeightsLimit)
          << n_tokens << " tokens";
    }
  }
}

TEST_P(LowBitGemmWidthGpuTest, EveryCutIsRightAndTheSameInEveryRun) {
  const QuantizedMatrix m = RandomQuantized(416, 1536, 128, GetParam(), 4);
  const ServingMatrix serving = Build({m});
  for (const int64_t n_tokens : {9, 64, 300}) {
    const Activations x = RandomActivations(n_tokens, m.cols, 5);
    const Tiles tiles = MakeTiles({.n_tokens = n_tokens, .x = x.device.data()}, m.cols);
    const std::vector<double> expected = Reference(m, x.host, n_tokens);
    for (const LowBitGemmTuning& cut : kCuts) {
      SCOPED_TRACE(
          absl::StrCat(n_tokens, " tokens, ", cut.tile_tokens, " at once, split ", cut.split));
      const std::vector<float> y = Multiply(serving, tiles.tiles, n_tokens, cut);
      EXPECT_LT(RelativeError(y, expected), kWeightsLimit);
      for (int run = 0; run < 5; ++run) {
        ASSERT_EQ(Multiply(serving, tiles.tiles, n_tokens, cut), y) << "run " << run;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Widths, LowBitGemmWidthGpuTest,
    ::testing::Values(Width{2, StoredGrid::kGptq}, Width{3, StoredGrid::kGptq},
                      Width{4, StoredGrid::kGptq}, Width{8, StoredGrid::kGptq},
                      Width{4, StoredGrid::kGptq, true}, Width{2, StoredGrid::kFloatZeros},
                      Width{3, StoredGrid::kFloatZeros}, Width{4, StoredGrid::kFloatZeros},
                      Width{8, StoredGrid::kFloatZeros}, Width{2, StoredGrid::kCodebook}),
    NameOf);

TEST_F(LowBitGemmGpuTest, LargeProducts) {
  const QuantizedMatrix m = RandomQuantized(1312, 896, 128, kFourBits, 6);
  const ServingMatrix serving = Build({m});
  constexpr int64_t kMany = 1001;
  const Activations x = RandomActivations(kMany, m.cols, 7);
  const Tiles tiles = MakeTiles({.n_tokens = kMany, .x = x.device.data()}, m.cols);
  const std::vector<double> expected = Reference(m, x.host, kMany);
  for (const LowBitGemmTuning& cut : kCuts) {
    EXPECT_LT(RelativeError(Multiply(serving, tiles.tiles, kMany, cut), expected), kWeightsLimit)
        << cut.tile_tokens << " at once, split " << cut.split;
  }
}

TEST_F(LowBitGemmGpuTest, BiasResidualAndStride) {
  const QuantizedMatrix m = RandomQuantized(160, 576, 64, kFourBits, 8);
  const ServingMatrix serving = Build({m});
  const Activations x = RandomActivations(kTokens, m.cols, 9);
  const Tiles tiles = MakeTiles({.n_tokens = kTokens, .x = x.device.data()}, m.cols);
  const std::vector<float> bias = RandomNormal(m.rows, 10);
  const auto device_bias = Upload(bias);
  std::vector<double> expected = Reference(m, x.host, kTokens);
  for (size_t i = 0; i < expected.size(); ++i) {
    expected[i] += static_cast<double>(bias[i % bias.size()]);
  }
  for (const int64_t stride : {m.rows, m.rows + 6, m.rows + 64}) {
    SCOPED_TRACE(stride);
    const std::vector<float> residual = RandomNormal(kTokens * stride, 11);
    for (const bool adds : {false, true}) {
      auto y = Upload(residual);
      ASSERT_OK(LowBitGemm({.n_tokens = kTokens,
                            .weights = &serving,
                            .x = tiles.tiles,
                            .bias = device_bias.data(),
                            .output = adds ? LowBitOutput::kAdd : LowBitOutput::kStore,
                            .y_float = y.data(),
                            .y_stride = stride,
                            .stream = context().stream()}));
      const std::vector<float> actual = Download(y);
      std::vector<float> products;
      for (size_t i = 0; i < actual.size(); ++i) {
        const auto col = static_cast<int64_t>(i) % stride;
        if (col >= m.rows) {
          ASSERT_EQ(actual[i], residual[i]) << "written beyond the row at " << i;
        } else {
          products.push_back(actual[i] - (adds ? residual[i] : 0));
        }
      }
      EXPECT_LT(RelativeError(products, expected), kWeightsLimit) << adds;
    }
    auto y = Upload(std::vector<__nv_bfloat16>(residual.size(), __float2bfloat16(7)));
    ASSERT_OK(LowBitGemm({.n_tokens = kTokens,
                          .weights = &serving,
                          .x = tiles.tiles,
                          .bias = device_bias.data(),
                          .y_bf16 = y.data(),
                          .y_stride = stride,
                          .stream = context().stream()}));
    std::vector<float> products;
    const std::vector<__nv_bfloat16> actual = Download(y);
    for (size_t i = 0; i < actual.size(); ++i) {
      const float v = __bfloat162float(actual[i]);
      if (static_cast<int64_t>(i) % stride < m.rows) {
        products.push_back(v);
      } else {
        ASSERT_EQ(v, 7) << "written beyond the row at " << i;
      }
    }
    EXPECT_LT(RelativeError(products, expected), kBothLimit);
  }
}

TEST_F(LowBitGemmGpuTest, GatedUnits) {
  const QuantizedMatrix gate = RandomQuantized(224, 576, 64, kFourBits, 12);
  const QuantizedMatrix up = RandomQuantized(224, 576, 64, kFourBits, 13);
  const ServingMatrix serving = Build({gate, up}, ServingRows::kInterleaved);
  const Activations x = RandomActivations(kTokens, gate.cols, 14);
  const Tiles tiles = MakeTiles({.n_tokens = kTokens, .x = x.device.data()}, gate.cols);
  const std::vector<float> bias = RandomNormal(2 * gate.rows, 15, 0.1f);
  const auto device_bias = Upload(bias);
  const std::vector<double> gates = Reference(gate, x.host, kTokens);
  const std::vector<double> ups = Reference(up, x.host, kTokens);
  for (const LowBitOutput output : {LowBitOutput::kSiluMul, LowBitOutput::kGeluMul}) {
    std::vector<double> expected;
    for (size_t i = 0; i < gates.size(); ++i) {
      const size_t row = i % static_cast<size_t>(gate.rows);
      const double g = gates[i] + static_cast<double>(bias[row]);
      const double u = ups[i] + static_cast<double>(bias[row + static_cast<size_t>(gate.rows)]);
      const double inner = 0.7978845608028654 * (g + 0.044715 * g * g * g);
      expected.push_back(u * (output == LowBitOutput::kSiluMul ? g / (1 + std::exp(-g))
                                                               : g * (1 + std::tanh(inner)) / 2));
    }
    for (const LowBitGemmTuning& cut : kCuts) {
      SCOPED_TRACE(absl::StrCat(cut.tile_tokens, " at once, split ", cut.split));
      LowBitGemmParams params{.n_tokens = kTokens,
                              .weights = &serving,
                              .x = tiles.tiles,
                              .bias = device_bias.data(),
                              .output = output,
                              .tuning = cut,
                              .stream = context().stream()};
      auto y = Poisoned<__nv_bfloat16>(kTokens * gate.rows);
      params.y_bf16 = y.data();
      ASSERT_OK(LowBitGemm(params));
      std::vector<float> rows;
      for (const __nv_bfloat16 v : Download(y)) rows.push_back(__bfloat162float(v));
      EXPECT_LT(RelativeError(rows, expected), 2 * kBothLimit);
      const Tiles made = EmptyTiles(kTokens, gate.rows);
      params.y_bf16 = nullptr;
      params.y_tiles = made.tiles;
      ASSERT_OK(LowBitGemm(params));
      EXPECT_EQ(ReadTiles(made, kTokens), rows);
    }
  }
}

TEST_F(LowBitGemmGpuTest, ATokenThatIsNoNumberSpoilsItsOwnRowOnly) {
  const QuantizedMatrix m = RandomQuantized(160, 576, 64, kFourBits, 16);
  const ServingMatrix serving = Build({m});
  Activations x = RandomActivations(40, m.cols, 17);
  const Tiles clean = MakeTiles({.n_tokens = 40, .x = x.device.data()}, m.cols);
  const std::vector<float> expected = Multiply(serving, clean.tiles, 40);
  std::vector<__nv_bfloat16> bad = Download(x.device);
  bad[static_cast<size_t>(7 * m.cols + 5)] = __float2bfloat16(NAN);
  const auto device = Upload(bad);
  const Tiles tiles = MakeTiles({.n_tokens = 40, .x = device.data()}, m.cols);
  const std::vector<float> y = Multiply(serving, tiles.tiles, 40);
  for (size_t i = 0; i < y.size(); ++i) {
    if (static_cast<int64_t>(i) / m.rows == 7) {
      EXPECT_TRUE(std::isnan(y[i])) << i;
    } else {
      ASSERT_EQ(y[i], expected[i]) << i;
    }
  }
}

TEST_F(LowBitGemmGpuTest, TilesHoldNormedOrderedAndRotatedRows) {
  constexpr int64_t kRows = 11;
  for (const int64_t cols : {64, 576, 4096, 5120}) {
    const std::vector<float> x = RandomNormal(kRows * cols, 18, 3.0f);
    const auto device = Upload(x);
    const std::vector<float> weight = RandomNormal(cols, 19);
    const auto device_weight = Upload(weight);
    const std::vector<int32_t> order = RandomOrder(cols, 20);
    const auto device_order = Upload(order);
    std::vector<float> normed;
    for (int64_t r = 0; r < kRows; ++r) {
      double squares = 0;
      const float* row = x.data() + r * cols;
      for (int64_t c = 0; c < cols; ++c) squares += static_cast<double>(row[c]) * row[c];
      const double factor = 1 / std::sqrt(squares / static_cast<double>(cols) + 1e-5);
      for (int64_t c = 0; c < cols; ++c) {
        normed.push_back(static_cast<float>(row[c] * factor * weight[static_cast<size_t>(c)]));
      }
    }
    for (const bool has_norm : {false, true}) {
      for (const bool is_ordered : {false, true}) {
        for (const int64_t block : {0, 16, 32, 64}) {
          SCOPED_TRACE(absl::StrCat(cols, " columns, norm ", has_norm, ", ordered ", is_ordered,
                                    ", rotated by ", block));
          const Tiles tiles = MakeTiles({.n_tokens = kRows,
                                         .x_float = device.data(),
                                         .has_norm = has_norm,
                                         .norm_weight = has_norm ? device_weight.data() : nullptr,
                                         .eps = has_norm ? 1e-5f : 0.0f,
                                         .input_order = is_ordered ? device_order.data() : nullptr,
                                         .rotation_block = block},
                                        cols);
          EXPECT_LT(
              RelativeError(ReadTiles(tiles, kRows),
                            TransformedRows(has_norm ? normed : x, cols,
                                            is_ordered ? order : std::vector<int32_t>(), block)),
              kWeightsLimit);
        }
      }
    }
    // What is beyond the columns is zero, as it meets weights that are.
    const Tiles tiles = MakeTiles({.n_tokens = kRows, .x_float = device.data()}, cols);
    const std::vector<__nv_bfloat16> raw = Download(tiles.buffer);
    for (int64_t token = 0; token < kRows; ++token) {
      for (int64_t col = cols; col < (cols + 127) / 128 * 128; ++col) {
        ASSERT_EQ(__bfloat162float(raw[PlaceInTiles(tiles.tiles, token, col)]), 0);
      }
    }
  }
}

TEST_F(LowBitGemmGpuTest, WhatDoesNotFitIsRefused) {
  const QuantizedMatrix m = RandomQuantized(64, 576, 64, kFourBits, 21);
  const ServingMatrix serving = Build({m});
  const Tiles tiles = EmptyTiles(16, m.cols);
  auto y = Poisoned<float>(16 * m.rows);
  const LowBitGemmParams good{.n_tokens = 16,
                              .weights = &serving,
                              .x = tiles.tiles,
                              .y_float = y.data(),
                              .stream = context().stream()};
  const auto expect_refused = [&](const LowBitGemmParams& params, const std::string& message) {
    EXPECT_THAT(LowBitGemm(params),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  LowBitGemmParams p = good;
  p.n_tokens = 17;
  expect_refused(p, "17 tokens, the limit is 16");
  p = good;
  p.x.cols = 512;
  expect_refused(p, "activations of 512 columns, the weights have 576");
  p = good;
  p.y_stride = 63;
  expect_refused(p, "stride 63 of y, must be at least its columns, 64");
  p = good;
  p.y_tiles = tiles.tiles;
  expect_refused(p, "one of y_float, y_bf16 and y_tiles");
  p = good;
  p.output = LowBitOutput::kSiluMul;
  expect_refused(p, "interleaved");
  p = good;
  p.tuning = {.tile_tokens = 48};
  expect_refused(p, "tuning of 48 tokens");
  p = good;
  p.tuning = {.split = 6};  // 576 columns are five blocks
  expect_refused(p, "6 parts (1 to 5)");
  p = good;
  p.x.data += 8;
  expect_refused(p, "token tiles must be aligned to 128 bytes, is 16 bytes off");
  p = good;
  p.x.data = nullptr;
  expect_refused(p, "token tiles without data");
  p = good;
  p.x.capacity = 12;
  expect_refused(p, "a capacity of 12, must be a multiple of 8");
  p = good;
  p.n_tokens = 0;
  EXPECT_OK(LowBitGemm(p));
}

}  // namespace
}  // namespace walsh::kernels::cuda
