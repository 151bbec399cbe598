// Products with quantized weights in the serving layout: the layout's way back exactly, products
// against double, and the same bits whatever the batch, the run and the cut of the work.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/low_bit_fixture.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/serving_layout.h"
#include "worker/kernels/cuda/transform_activations.h"
#include "worker/tensor/half.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

// ‖y − reference‖ / ‖reference‖. Activations are rounded to 16 bits of the largest of 128 columns:
// of normal ones next to nothing is lost where they are bf16; where they are fp32, a tenth of what
// rounding to bf16 loses at most. One that is fifty times the others costs those of its block.
constexpr double kNormalLimit = 1e-5;
constexpr double kNormalFloatLimit = 6e-5;
constexpr double kFloatLimit = 2e-4;
constexpr double kBf16Limit = 3e-3;  // half a unit in the last place is 2^-9 of a number
constexpr uint16_t kBf16Poison = 0xffff;

class LowBitProductGpuTest : public LowBitGpuTest {
 protected:
  // `params` lacks the result, the workspace and the stream.
  std::vector<float> Multiply(LowBitMatmulParams params, bool has_workspace = true) {
    auto y = Poisoned<float>(params.n_tokens * params.weights->shape().rows);
    params.y_float = y.data();
    params.stream = context().stream();
    DeviceBuffer<uint8_t> workspace;
    if (has_workspace) {
      workspace =
          Poisoned<uint8_t>(LowBitWorkspaceBytes(params.n_tokens, params.weights->shape().cols));
      params.workspace = workspace.data();
      params.workspace_bytes = workspace.size_bytes();
    }
    EXPECT_OK(LowBitMatmul(params));
    return Download(y);
  }
  std::vector<float> Multiply(const ServingMatrix& weights, const DeviceBuffer<__nv_bfloat16>& x,
                              int64_t n_tokens, const LowBitTuning& tuning = {},
                              bool has_workspace = true) {
    return Multiply({.n_tokens = n_tokens, .weights = &weights, .x = x.data(), .tuning = tuning},
                    has_workspace);
  }
};

// The least row and token where two results differ in a bit; −1: none.
int64_t FirstDifference(const std::vector<float>& a, const std::vector<float>& b, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return static_cast<int64_t>(i);
  }
  return -1;
}

class LowBitWidthGpuTest : public LowBitProductGpuTest,
                           public ::testing::WithParamInterface<Width> {};

TEST_P(LowBitWidthGpuTest, LayoutGivesBackEveryCodeAndWeight) {
  for (const Shape& s : ShapesOf(GetParam())) {
    SCOPED_TRACE(absl::StrCat(s.rows, " x ", s.cols, ", group ", s.group_size));
    const QuantizedMatrix m = RandomQuantized(s.rows, s.cols, s.group_size, GetParam(), 1);
    const ServingMatrix serving = Build({m});
    auto codes = Poisoned<uint8_t>(s.rows * s.cols);
    auto weights = Poisoned<float>(s.rows * s.cols);
    ASSERT_OK(serving.Unpack(codes.data(), weights.data(), context().stream()));
    EXPECT_EQ(Download(codes), m.codes);
    const Matrix dense = Dequantize(m);
    const std::vector<float> actual = Download(weights);
    int64_t n_wrong = 0;
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t c = 0; c < s.cols; ++c) {
        n_wrong += actual[static_cast<size_t>(r * s.cols + c)] != dense(r, c) ? 1 : 0;
      }
    }
    EXPECT_EQ(n_wrong, 0);
  }
}

TEST_P(LowBitWidthGpuTest, ProductsAreThoseOfDoubleAndTheSameInEveryBatch) {
  for (const Shape& s : ShapesOf(GetParam())) {
    SCOPED_TRACE(absl::StrCat(s.rows, " x ", s.cols, ", group ", s.group_size));
    const QuantizedMatrix m = RandomQuantized(s.rows, s.cols, s.group_size, GetParam(), 2);
    const ServingMatrix serving = Build({m});
    const Activations x = RandomActivations(kLowBitTokensMax, s.cols, 3);
    const std::vector<float> all = Multiply(serving, x.device, kLowBitTokensMax);
    EXPECT_LT(RelativeError(all, Reference(m, x.host, kLowBitTokensMax)), kFloatLimit);
    for (const int64_t n_tokens : {1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64}) {
      for (const int row_tiles : {0, 2, 4}) {
        const std::vector<float> some =
            Multiply(serving, x.device, n_tokens, {.row_tiles = row_tiles});
        EXPECT_EQ(FirstDifference(some, all, some.size()), -1)
            << n_tokens << " tokens, row tiles " << row_tiles;
      }
      const std::vector<float> alone = Multiply(serving, x.device, n_tokens, {}, false);
      EXPECT_EQ(FirstDifference(alone, all, alone.size()), -1)
          << n_tokens << " tokens, no workspace";
    }
  }
}

TEST_P(LowBitWidthGpuTest, NormalActivationsLoseNextToNothing) {
  const QuantizedMatrix m = RandomQuantized(96, 1536, 128, GetParam(), 31);
  const ServingMatrix serving = Build({m});
  const Activations x = RandomActivations(9, m.cols, 32, 1);
  EXPECT_LT(RelativeError(Multiply(serving, x.device, 9), Reference(m, x.host, 9)), kNormalLimit);
  const std::vector<float> values = RandomNormal(9 * m.cols, 33);
  const auto device = Upload(values);
  const std::vector<float> y =
      Multiply({.n_tokens = 9, .weights = &serving, .x_float = device.data()});
  EXPECT_LT(RelativeError(y, Reference(m, values, 9)), kNormalFloatLimit);
}

TEST_P(LowBitWidthGpuTest, EveryCutAndRunIsTheSame) {
  const QuantizedMatrix m = RandomQuantized(96, 4864, 128, GetParam(), 4);
  const ServingMatrix serving = Build({m});
  for (const int64_t n_tokens : {1, 4, 13, 40}) {
    const Activations x = RandomActivations(n_tokens, m.cols, 5);
    const std::vector<float> y = Multiply(serving, x.device, n_tokens);
    EXPECT_LT(RelativeError(y, Reference(m, x.host, n_tokens)), kFloatLimit);
    for (const int row_tiles : {2, 4}) {
      for (int run = 0; run < 20; ++run) {
        const std::vector<float> again =
            Multiply(serving, x.device, n_tokens, {.row_tiles = row_tiles});
        ASSERT_EQ(FirstDifference(again, y, y.size()), -1) << row_tiles << " tiles, run " << run;
      }
    }
    const std::vector<float> larger = Multiply({.n_tokens = n_tokens,
                                                .weights = &serving,
                                                .x = x.device.data(),
                                                .shared_part = SharedPart::kLarger});
    EXPECT_EQ(FirstDifference(larger, y, y.size()), -1) << n_tokens << " tokens";
  }
}

TEST_P(LowBitWidthGpuTest, LayoutTakesRowsAndColumnsInAnotherOrder) {
  for (const Shape& s : std::vector<Shape>{{64, 576, 64}, {96, 896, 128}, {32, 1536, kWholeRow}}) {
    SCOPED_TRACE(absl::StrCat(s.rows, " x ", s.cols, ", group ", s.group_size));
    const QuantizedMatrix m = RandomQuantized(s.rows, s.cols, s.group_size, GetParam(), 51);
    const std::vector<int32_t> rows = RandomOrder(s.rows, 52);
    const std::vector<int32_t> columns = RandomOrder(s.cols, 53);
    const ServingMatrix serving = BuildOrdered(m, rows, columns);
    auto codes = Poisoned<uint8_t>(s.rows * s.cols);
    auto weights = Poisoned<float>(s.rows * s.cols);
    ASSERT_OK(serving.Unpack(codes.data(), weights.data(), context().stream()));
    // The grids of a row stay in the order of their groups.
    QuantizedMatrix expected = m;
    for (int64_t r = 0; r < s.rows; ++r) {
      const auto row = static_cast<int64_t>(rows[static_cast<size_t>(r)]);
      for (int64_t c = 0; c < s.cols; ++c) {
        expected.codes[static_cast<size_t>(r * s.cols + c)] =
            m.codes[static_cast<size_t>(row * s.cols + columns[static_cast<size_t>(c)])];
      }
      const auto move = [&](const auto& from, auto& to) {
        const int64_t n = static_cast<int64_t>(from.size()) / s.rows;
        std::copy_n(from.begin() + row * n, n, to.begin() + r * n);
      };
      move(m.scales, expected.scales);
      move(m.zeros, expected.zeros);
      move(m.float_zeros, expected.float_zeros);
      move(m.levels, expected.levels);
    }
    EXPECT_EQ(Download(codes), expected.codes);
    const Matrix dense = Dequantize(expected);
    EXPECT_EQ(Download(weights), std::vector<float>(dense.span().begin(), dense.span().end()));
  }
}

// Activations in another order, rotated, or both, behind the norm, from one token on.
TEST_P(LowBitWidthGpuTest, ActivationsAreReorderedAndRotatedOnTheWay) {
  constexpr float kEps = 1e-2f;
  struct Case {
    int64_t cols, group_size;
    bool has_order;
    int64_t block;
  };
  for (const Case& c : std::vector<Case>{{2432, 128, false, 128},
                                         {2432, 32, false, 64},
                                         {1504, kWholeRow, false, 32},
                                         {1504, kWholeRow, false, 16},
                                         {2432, 64, true, 0},
                                         {1536, 128, true, 128}}) {
    const QuantizedMatrix m = RandomQuantized(96, c.cols, c.group_size, GetParam(), 54);
    const ServingMatrix serving = Build({m});
    const std::vector<int32_t> order =
        c.has_order ? RandomOrder(c.cols, 55) : std::vector<int32_t>();
    const auto order_buffer = Upload(RandomOrder(c.cols, 55));
    const Activations x = RandomActivations(kLowBitTokensMax, c.cols, 56);
    const std::vector<float> values = RandomNormal(kLowBitTokensMax * c.cols, 57, 0.3f);
    const auto x_float = Upload(values);
    std::vector<float> factors = RandomNormal(c.cols, 58, 0.1f);
    for (float& f : factors) f += 1;
    const auto weight = Upload(factors);
    for (const bool has_norm : {false, true}) {
      SCOPED_TRACE(absl::StrCat(c.cols, " columns, order ", c.has_order, ", block ", c.block,
                                has_norm ? ", norm" : ""));
      std::vector<float> input = has_norm ? values : x.host;
      std::vector<double> norms(kLowBitTokensMax, 1.0);
      for (int64_t t = 0; has_norm && t < kLowBitTokensMax; ++t) {
        double squares = 0;
        for (int64_t i = 0; i < c.cols; ++i) {
          float& v = input[static_cast<size_t>(t * c.cols + i)];
          squares += static_cast<double>(v) * static_cast<double>(v);
          v *= factors[static_cast<size_t>(i)];
        }
        norms[static_cast<size_t>(t)] =
            1 / std::sqrt(squares / static_cast<double>(c.cols) + static_cast<double>(kEps));
      }
      const std::vector<double> rows = TransformedRows(input, c.cols, order, c.block);
      std::vector<double> expected =
          Reference(m, std::vector<float>(rows.begin(), rows.end()), kLowBitTokensMax);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] *= norms[i / 96];
      LowBitMatmulParams params{.n_tokens = kLowBitTokensMax,
                                .weights = &serving,
                                .x = has_norm ? nullptr : x.device.data(),
                                .x_float = has_norm ? x_float.data() : nullptr,
                                .has_norm = has_norm,
                                .norm_weight = has_norm ? weight.data() : nullptr,
                                .eps = has_norm ? kEps : 0,
                                .input_order = c.has_order ? order_buffer.data() : nullptr,
                                .rotation_block = c.block};
      const std::vector<float> all = Multiply(params);
      EXPECT_LT(RelativeError(all, expected), kFloatLimit);
      for (const int64_t n_tokens : {1, 2, 3, 4, 5, 16, 30}) {
        params.n_tokens = n_tokens;
        for (const bool has_workspace : {false, true}) {
          const std::vector<float> some = Multiply(params, has_workspace);
          EXPECT_EQ(FirstDifference(some, all, some.size()), -1)
              << n_tokens << " tokens, workspace " << has_workspace;
        }
      }
    }
  }
}

// fp32 activations and RMSNorm, which no launch of their own computes.
TEST_P(LowBitWidthGpuTest, NormOfTheActivations) {
  constexpr float kEps = 1e-2f;  // so large that it is seen
  for (const int64_t group_size : {32, 128}) {
    const QuantizedMatrix m = RandomQuantized(96, 2432, group_size, GetParam(), 34);
    const ServingMatrix serving = Build({m});
    const Activations x = RandomActivations(kLowBitTokensMax, m.cols, 35);
    const std::vector<float> values = RandomNormal(kLowBitTokensMax * m.cols, 36, 0.3f);
    const auto x_float = Upload(values);
    std::vector<float> factors = RandomNormal(m.cols, 37, 0.1f);
    for (float& f : factors) f += 1;
    const auto weight = Upload(factors);
    for (const bool is_float : {false, true}) {
      for (const bool has_weight : {false, true}) {
        SCOPED_TRACE(absl::StrCat("group ", group_size, is_float ? ", fp32" : ", bf16",
                                  has_weight ? ", weight" : ""));
        const std::vector<float>& input = is_float ? values : x.host;
        std::vector<float> weighted = input;
        for (size_t i = 0; has_weight && i < weighted.size(); ++i) {
          weighted[i] *= factors[i % static_cast<size_t>(m.cols)];
        }
        std::vector<double> expected = Reference(m, weighted, kLowBitTokensMax);
        for (int64_t t = 0; t < kLowBitTokensMax; ++t) {
          double sum = 0;
          for (int64_t c = 0; c < m.cols; ++c) {
            const auto v = static_cast<double>(input[static_cast<size_t>(t * m.cols + c)]);
            sum += v * v;
          }
          const double factor =
              1 / std::sqrt(sum / static_cast<double>(m.cols) + static_cast<double>(kEps));
          for (int64_t r = 0; r < m.rows; ++r) {
            expected[static_cast<size_t>(t * m.rows + r)] *= factor;
          }
        }
        LowBitMatmulParams params{.n_tokens = kLowBitTokensMax,
                                  .weights = &serving,
                                  .x = is_float ? nullptr : x.device.data(),
                                  .x_float = is_float ? x_float.data() : nullptr,
                                  .has_norm = true,
                                  .norm_weight = has_weight ? weight.data() : nullptr,
                                  .eps = kEps};
        const std::vector<float> all = Multiply(params);
        EXPECT_LT(RelativeError(all, expected), kFloatLimit);
        for (const int64_t n_tokens : {1, 2, 4, 5, 16, 30}) {
          params.n_tokens = n_tokens;
          for (const bool has_workspace : {false, true}) {
            const std::vector<float> some = Multiply(params, has_workspace);
            EXPECT_EQ(FirstDifference(some, all, some.size()), -1)
                << n_tokens << " tokens, workspace " << has_workspace;
          }
        }
      }
    }
  }
}

TEST_P(LowBitWidthGpuTest, SeveralGroupsOfRowsForACta) {
  const QuantizedMatrix m = RandomQuantized(8224, 1408, 128, GetParam(), 6);
  const ServingMatrix serving = Build({m});
  const Activations x = RandomActivations(20, m.cols, 7);
  const std::vector<float> y = Multiply(serving, x.device, 20);
  EXPECT_LT(RelativeError(y, Reference(m, x.host, 20)), kFloatLimit);
  for (const int64_t n_tokens : {1, 4, 11, 20}) {
    for (const int ctas_per_sm : {1, 2}) {
      // Without a workspace the CTAs are shared by five chunks of tokens, so that each takes
      // several passes.
      for (const bool has_workspace : {false, true}) {
        const std::vector<float> other =
            Multiply(serving, x.device, n_tokens, {.ctas_per_sm = ctas_per_sm}, has_workspace);
        EXPECT_EQ(FirstDifference(other, y, other.size()), -1)
            << n_tokens << " tokens, " << ctas_per_sm << " CTAs, workspace " << has_workspace;
      }
    }
  }
}

// As many columns as a CTA holds records of, and so many tokens that it has many rows: its sums
// must fit beside them.
TEST_P(LowBitWidthGpuTest, SumsFitBesideTheMostRecords) {
  constexpr int64_t kTokens = 64;
  const QuantizedMatrix m = RandomQuantized(256, 53248, 32, GetParam(), 61);
  const ServingMatrix serving = Build({m});
  const Activations x = RandomActivations(kTokens, m.cols, 62);
  const std::vector<float> y = Multiply(serving, x.device, kTokens);
  const std::vector<float> alone = Multiply(serving, x.device, kTokens, {}, false);
  EXPECT_EQ(FirstDifference(alone, y, y.size()), -1);
  for (const int64_t n_tokens : {1, 2}) {
    for (const int row_tiles : {2, 4}) {
      const std::vector<float> few =
          Multiply(serving, x.device, n_tokens, {.row_tiles = row_tiles}, false);
      EXPECT_EQ(FirstDifference(few, y, few.size()), -1) << n_tokens << ", " << row_tiles;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Widths, LowBitWidthGpuTest,
    ::testing::Values(Width{2, StoredGrid::kGptq}, Width{3, StoredGrid::kGptq},
                      Width{4, StoredGrid::kGptq}, Width{8, StoredGrid::kGptq},
                      Width{2, StoredGrid::kGptq, true}, Width{3, StoredGrid::kGptq, true},
                      Width{4, StoredGrid::kGptq, true}, Width{8, StoredGrid::kGptq, true},
                      Width{2, StoredGrid::kFloatZeros}, Width{3, StoredGrid::kFloatZeros},
                      Width{4, StoredGrid::kFloatZeros}, Width{8, StoredGrid::kFloatZeros},
                      Width{2, StoredGrid::kCodebook}),
    NameOf);

constexpr Width kFourBits{4, StoredGrid::kGptq};

TEST_F(LowBitProductGpuTest, StackedLinears) {
  const QuantizedMatrix q = RandomQuantized(96, 896, 128, kFourBits, 8);
  const QuantizedMatrix k = RandomQuantized(32, 896, 128, kFourBits, 9);
  const QuantizedMatrix v = RandomQuantized(64, 896, 128, kFourBits, 10);
  const ServingMatrix serving = Build({q, k, v});
  const Activations x = RandomActivations(3, 896, 11);
  const std::vector<float> y = Multiply(serving, x.device, 3);
  int64_t row = 0;
  for (const QuantizedMatrix* m : {&q, &k, &v}) {
    const std::vector<float> alone = Multiply(Build({*m}), x.device, 3);
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t r = 0; r < m->rows; ++r) {
        EXPECT_EQ(y[static_cast<size_t>(t * 192 + row + r)],
                  alone[static_cast<size_t>(t * m->rows + r)]);
      }
    }
    row += m->rows;
  }
}

TEST_F(LowBitProductGpuTest, WhatIsDoneWithTheProduct) {
  // 104 rows each are 13 tiles of eight of both, the last without another beside it.
  const Width width{3, StoredGrid::kFloatZeros};
  const QuantizedMatrix gate = RandomQuantized(104, 1536, 128, width, 12);
  const QuantizedMatrix up = RandomQuantized(104, 1536, 128, width, 13);
  const ServingMatrix pairs = Build({gate, up}, ServingRows::kInterleaved);
  auto codes = Poisoned<uint8_t>(208 * 1536);
  ASSERT_OK(pairs.Unpack(codes.data(), nullptr, context().stream()));
  std::vector<uint8_t> both = gate.codes;
  both.insert(both.end(), up.codes.begin(), up.codes.end());
  EXPECT_EQ(Download(codes), both) << "rows come back in their own order";

  constexpr int64_t kStride = 240;
  auto workspace = Poisoned<uint8_t>(LowBitWorkspaceBytes(50, 1536));
  for (const bool has_workspace : {false, true}) {
    for (const int64_t n : {1, 2, 5, 12, 50}) {
      SCOPED_TRACE(absl::StrCat(n, " tokens, workspace ", has_workspace));
      const Activations x = RandomActivations(n, 1536, 14);
      const std::vector<float> bias = RandomNormal(208, 15);
      const auto device_bias = Upload(bias);
      std::vector<double> v_gate = Reference(gate, x.host, n);
      std::vector<double> v_up = Reference(up, x.host, n);
      std::vector<double> silu;
      std::vector<double> gelu;
      std::vector<double> plain;
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t r = 0; r < 104; ++r) {
          const auto i = static_cast<size_t>(t * 104 + r);
          v_gate[i] += static_cast<double>(bias[static_cast<size_t>(r)]);
          v_up[i] += static_cast<double>(bias[static_cast<size_t>(104 + r)]);
          silu.push_back(v_gate[i] / (1 + std::exp(-v_gate[i])) * v_up[i]);
          const double inner = std::sqrt(2 / std::acos(-1.0)) *
                               (v_gate[i] + 0.044715 * v_gate[i] * v_gate[i] * v_gate[i]);
          gelu.push_back(0.5 * v_gate[i] * (1 + std::tanh(inner)) * v_up[i]);
        }
        for (int64_t r = 0; r < 104; ++r) plain.push_back(v_gate[static_cast<size_t>(t * 104 + r)]);
        for (int64_t r = 0; r < 104; ++r) plain.push_back(v_up[static_cast<size_t>(t * 104 + r)]);
      }
      LowBitMatmulParams params{.n_tokens = n,
                                .weights = &pairs,
                                .x = x.device.data(),
                                .bias = device_bias.data(),
                                .y_stride = kStride,
                                .workspace = has_workspace ? workspace.data() : nullptr,
                                .workspace_bytes = workspace.size_bytes(),
                                .stream = context().stream()};
      std::vector<float> actual;
      for (const LowBitOutput output : {LowBitOutput::kSiluMul, LowBitOutput::kGeluMul}) {
        auto y_bf16 = Poisoned<uint16_t>(n * kStride);
        params.output = output;
        params.y_bf16 = reinterpret_cast<__nv_bfloat16*>(y_bf16.data());
        ASSERT_OK(LowBitMatmul(params));
        const std::vector<uint16_t> stored = Download(y_bf16);
        actual.clear();
        int64_t n_touched = 0;
        for (int64_t i = 0; i < n * kStride; ++i) {
          const uint16_t bits = stored[static_cast<size_t>(i)];
          if (i % kStride < 104) {
            actual.push_back(Bf16ToFloat(bits));
          } else {
            n_touched += bits != kBf16Poison ? 1 : 0;
          }
        }
        EXPECT_LT(RelativeError(actual, output == LowBitOutput::kSiluMul ? silu : gelu),
                  kBf16Limit);
        EXPECT_EQ(n_touched, 0) << "beyond the columns of y";
      }

      params.output = LowBitOutput::kAdd;
      params.y_bf16 = nullptr;
      const std::vector<float> residual = RandomNormal(n * kStride, 16);
      auto y = Upload(residual);
      params.y_float = y.data();
      ASSERT_OK(LowBitMatmul(params));
      const std::vector<float> added = Download(y);
      actual.clear();
      std::vector<double> expected;
      for (int64_t i = 0; i < n * kStride; ++i) {
        const auto at = static_cast<size_t>(i);
        if (i % kStride < 208) {
          actual.push_back(added[at]);
          expected.push_back(plain[static_cast<size_t>(i / kStride * 208 + i % kStride)] +
                             static_cast<double>(residual[at]));
        } else {
          EXPECT_EQ(added[at], residual[at]);
        }
      }
      EXPECT_LT(RelativeError(actual, expected), kFloatLimit);
    }
  }
}

TEST_F(LowBitProductGpuTest, ActivationsWithAStride) {
  const QuantizedMatrix m = RandomQuantized(64, 576, 64, kFourBits, 17);
  const ServingMatrix serving = Build({m});
  const Activations x = RandomActivations(4, 600, 18);
  auto y = Poisoned<float>(4 * 64);
  ASSERT_OK(LowBitMatmul({.n_tokens = 4,
                          .weights = &serving,
                          .x = x.device.data(),
                          .x_stride = 600,
                          .y_float = y.data(),
                          .stream = context().stream()}));
  std::vector<float> rows;
  for (int64_t t = 0; t < 4; ++t) {
    rows.insert(rows.end(), x.host.begin() + t * 600, x.host.begin() + t * 600 + 576);
  }
  EXPECT_LT(RelativeError(Download(y), Reference(m, rows, 4)), kFloatLimit);
}

// Linears that are not quantized: norm, bias and residual as above, and the same bits in every
// batch.
TEST_F(LowBitProductGpuTest, DenseProductsAreThoseOfDoubleAndTheSameInEveryBatch) {
  constexpr float kEps = 1e-2f;
  constexpr int64_t kTokens = 70;
  struct Dense {
    int64_t rows, cols;
  };
  for (const Dense& d : std::vector<Dense>{{1, 8}, {33, 896}, {256, 200}, {64, 4864}}) {
    const std::vector<float> normal = RandomNormal(d.rows * d.cols, 63, 0.05f);
    std::vector<__nv_bfloat16> weights;
    std::vector<float> weight_values;
    for (const float v : normal) {
      weights.push_back(__float2bfloat16(v));
      weight_values.push_back(__bfloat162float(weights.back()));
    }
    const auto d_weights = Upload(weights);
    const Activations x = RandomActivations(kTokens, d.cols, 64);
    const std::vector<float> values = RandomNormal(kTokens * d.cols, 65);
    const auto x_float = Upload(values);
    const std::vector<float> norm = RandomNormal(d.cols, 66);
    const auto d_norm = Upload(norm);
    const std::vector<float> bias = RandomNormal(d.rows, 67);
    const auto d_bias = Upload(bias);
    const std::vector<float> before = RandomNormal(kTokens * d.rows, 68);
    for (const bool has_norm : {false, true}) {
      SCOPED_TRACE(absl::StrCat(d.rows, " x ", d.cols, has_norm ? ", norm" : ""));
      std::vector<float> input = has_norm ? values : x.host;
      std::vector<double> factors(kTokens, 1.0);
      for (int64_t t = 0; has_norm && t < kTokens; ++t) {
        double squares = 0;
        for (int64_t c = 0; c < d.cols; ++c) {
          float& v = input[static_cast<size_t>(t * d.cols + c)];
          squares += static_cast<double>(v) * static_cast<double>(v);
          v *= norm[static_cast<size_t>(c)];
        }
        factors[static_cast<size_t>(t)] =
            1 / std::sqrt(squares / static_cast<double>(d.cols) + static_cast<double>(kEps));
      }
      std::vector<double> expected = Reference(weight_values, d.rows, d.cols, input, kTokens);
      for (size_t i = 0; i < expected.size(); ++i) {
        const size_t row = i % static_cast<size_t>(d.rows);
        expected[i] *= factors[i / static_cast<size_t>(d.rows)];
        expected[i] += static_cast<double>(bias[row]) + static_cast<double>(before[i]);
      }
      std::vector<float> all;
      for (const int64_t n : {kTokens, int64_t{1}, int64_t{3}, int64_t{4}, int64_t{9}}) {
        auto y = Upload(before);
        ASSERT_OK(DenseMatmul({.n_tokens = n,
                               .rows = d.rows,
                               .cols = d.cols,
                               .weights = d_weights.data(),
                               .x = has_norm ? nullptr : x.device.data(),
                               .x_float = has_norm ? x_float.data() : nullptr,
                               .has_norm = has_norm,
                               .norm_weight = has_norm ? d_norm.data() : nullptr,
                               .eps = kEps,
                               .bias = d_bias.data(),
                               .accumulate = true,
                               .y_float = y.data(),
                               .stream = context().stream()}));
        const std::vector<float> some = Download(y);
        if (all.empty()) all = some;
        EXPECT_EQ(FirstDifference(some, all, static_cast<size_t>(n * d.rows)), -1) << n;
      }
      EXPECT_LT(RelativeError(all, expected), 1e-5);
    }
    constexpr int64_t kStride = 264;
    auto y = Poisoned<uint16_t>(2 * kStride);
    ASSERT_OK(DenseMatmul({.n_tokens = 2,
                           .rows = d.rows,
                           .cols = d.cols,
                           .weights = d_weights.data(),
                           .x = x.device.data(),
                           .y_bf16 = reinterpret_cast<__nv_bfloat16*>(y.data()),
                           .y_stride = kStride,
                           .stream = context().stream()}));
    std::vector<float> actual;
    int64_t n_touched = 0;
    const std::vector<uint16_t> stored = Download(y);
    for (int64_t i = 0; i < 2 * kStride; ++i) {
      const uint16_t bits = stored[static_cast<size_t>(i)];
      if (i % kStride < d.rows) {
        actual.push_back(Bf16ToFloat(bits));
      } else {
        n_touched += bits != kBf16Poison ? 1 : 0;
      }
    }
    // Two results alone may both be half a unit in the last place off.
    EXPECT_LT(RelativeError(actual, Reference(weight_values, d.rows, d.cols, x.host, 2)),
              d.rows == 1 ? 0x1p-8 : kBf16Limit);
    EXPECT_EQ(n_touched, 0) << "beyond the columns of y";
  }
}

TEST_F(LowBitProductGpuTest, RefusesDenseProductsThatDoNotFit) {
  auto memory = Poisoned<float>(1024);
  const auto* bf16 = reinterpret_cast<const __nv_bfloat16*>(memory.data());
  const DenseMatmulParams good{.n_tokens = 1,
                               .rows = 8,
                               .cols = 16,
                               .weights = bf16,
                               .x = bf16,
                               .y_float = memory.data() + 512,
                               .stream = context().stream()};
  const auto with = [&](auto change) {
    DenseMatmulParams params = good;
    change(params);
    return DenseMatmul(params);
  };
  const auto invalid = [](const char* what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what));
  };
  using P = DenseMatmulParams;
  EXPECT_OK(with([](P&) {}));
  EXPECT_THAT(with([](P& p) { p.n_tokens = -1; }), invalid("-1 tokens"));
  EXPECT_THAT(with([](P& p) { p.cols = 12; }), invalid("12 columns"));
  EXPECT_THAT(with([](P& p) { p.x = nullptr; }), invalid("x_float"));
  EXPECT_THAT(with([](P& p) { p.y_float = nullptr; }), invalid("y_float"));
  EXPECT_THAT(with([](P& p) { p.y_stride = 7; }), invalid("stride 7"));
  EXPECT_THAT(with([](P& p) { p.x += 1; }), invalid("x must be aligned to 16 bytes, is 2"));
  EXPECT_THAT(with([&](P& p) {
                p.accumulate = true;
                p.y_float = nullptr;
                p.y_bf16 = reinterpret_cast<__nv_bfloat16*>(memory.data());
              }),
              invalid("fp32"));
}

// What products in bf16 are given instead.
TEST_F(LowBitProductGpuTest, TransformsActivationsInMemory) {
  struct Case {
    int64_t n_tokens, cols;
    bool has_order;
    int64_t block;
  };
  for (const Case& c : std::vector<Case>{{1, 128, false, 128},
                                         {300, 1536, false, 128},
                                         {7, 1504, false, 32},
                                         {33, 160, false, 16},
                                         {9, 2432, true, 0},
                                         {5, 896, true, 64}}) {
    SCOPED_TRACE(absl::StrCat(c.n_tokens, " x ", c.cols, ", block ", c.block));
    const Activations x = RandomActivations(c.n_tokens, c.cols, 59);
    const std::vector<int32_t> order = RandomOrder(c.cols, 60);
    const auto order_buffer = Upload(order);
    const std::vector<double> expected =
        TransformedRows(x.host, c.cols, c.has_order ? order : std::vector<int32_t>(), c.block);
    auto apart = Poisoned<__nv_bfloat16>(c.n_tokens * c.cols);
    auto in_place = Upload(Download(x.device));
    for (const bool is_in_place : {false, true}) {
      if (is_in_place && c.has_order) continue;
      DeviceBuffer<__nv_bfloat16>& y = is_in_place ? in_place : apart;
      ASSERT_OK(TransformActivations({.n_tokens = c.n_tokens,
                                      .cols = c.cols,
                                      .x = is_in_place ? in_place.data() : x.device.data(),
                                      .input_order = c.has_order ? order_buffer.data() : nullptr,
                                      .rotation_block = c.block,
                                      .y = y.data(),
                                      .stream = context().stream()}));
      std::vector<float> actual;
      for (const __nv_bfloat16 v : Download(y)) actual.push_back(__bfloat162float(v));
      EXPECT_LT(RelativeError(actual, expected), c.block == 0 ? 0x1p-30 : kBf16Limit);
    }
  }
}

TEST_F(LowBitProductGpuTest, RefusesTransformsThatDoNotFit) {
  auto x = Poisoned<__nv_bfloat16>(256);
  const auto order = Upload(RandomOrder(128, 61));
  const TransformActivationsParams good{
      .n_tokens = 1, .cols = 128, .x = x.data(), .y = x.data() + 128, .stream = context().stream()};
  const auto with = [&](auto change) {
    TransformActivationsParams params = good;
    change(params);
    return TransformActivations(params);
  };
  const auto invalid = [](const char* what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what));
  };
  using P = TransformActivationsParams;
  EXPECT_OK(with([](P&) {}));
  EXPECT_THAT(with([](P& p) { p.cols = 100; }), invalid("100 columns"));
  EXPECT_THAT(with([](P& p) { p.rotation_block = 256; }), invalid("blocks of 256 of 128"));
  EXPECT_THAT(with([](P& p) {
                p.cols = 96;
                p.rotation_block = 64;
              }),
              invalid("blocks of 64 of 96"));
  EXPECT_THAT(with([&](P& p) {
                p.input_order = order.data();
                p.y = x.data();
              }),
              invalid("not made in place"));
  EXPECT_THAT(with([](P& p) { p.y += 1; }), invalid("y must be aligned to 16 bytes, is 2"));
}

// A token's activations that are no numbers make its outputs NaN, and nobody else's; those that are
// next to nothing are zeros.
TEST_F(LowBitProductGpuTest, ActivationsThatAreNoNumbers) {
  const QuantizedMatrix m = RandomQuantized(64, 896, 128, kFourBits, 38);
  const ServingMatrix serving = Build({m});
  for (const int64_t n : {4, 12}) {
    std::vector<float> values = RandomNormal(n * 896, 39);
    const auto good = Upload(values);
    const std::vector<float> expected =
        Multiply({.n_tokens = n, .weights = &serving, .x_float = good.data()});
    values[700] = NAN;
    values[896 + 3] = -INFINITY;
    for (int64_t c = 0; c < 896; ++c) values[static_cast<size_t>(2 * 896 + c)] = 1e-35f;
    const auto bad = Upload(values);
    const std::vector<float> y =
        Multiply({.n_tokens = n, .weights = &serving, .x_float = bad.data()});
    for (int64_t i = 0; i < n * 64; ++i) {
      const float v = y[static_cast<size_t>(i)];
      if (i < 2 * 64) {
        EXPECT_TRUE(std::isnan(v)) << i;
      } else if (i < 3 * 64) {
        EXPECT_EQ(v, 0) << i;
      } else {
        EXPECT_EQ(v, expected[static_cast<size_t>(i)]) << i;
      }
    }
  }
}

// What fills up the last block meets activations of zero, whatever lies beyond the row.
TEST_F(LowBitProductGpuTest, ReadsNothingBeyondARow) {
  const QuantizedMatrix m = RandomQuantized(64, 160, kWholeRow, kFourBits, 19);
  const ServingMatrix serving = Build({m});
  constexpr int64_t kStride = 256;
  std::vector<__nv_bfloat16> x(2 * kStride, __float2bfloat16(NAN));
  std::vector<float> rows;
  const std::vector<float> normal = RandomNormal(2 * 160, 20);
  for (int64_t i = 0; i < 2 * 160; ++i) {
    __nv_bfloat16& v = x[static_cast<size_t>(i / 160 * kStride + i % 160)];
    v = __float2bfloat16(normal[static_cast<size_t>(i)]);
    rows.push_back(__bfloat162float(v));
  }
  const auto device = Upload(x);
  auto y = Poisoned<float>(2 * 64);
  ASSERT_OK(LowBitMatmul({.n_tokens = 2,
                          .weights = &serving,
                          .x = device.data(),
                          .x_stride = kStride,
                          .y_float = y.data(),
                          .stream = context().stream()}));
  EXPECT_LT(RelativeError(Download(y), Reference(m, rows, 2)), kFloatLimit);
}

// A chain in which each product reads what the one before wrote, in buffers that are used again.
TEST_F(LowBitProductGpuTest, OverlapChangesNothing) {
  constexpr int64_t kDim = 1536;
  constexpr int kLinks = 24;
  std::vector<ServingMatrix> weights;
  for (int i = 0; i < 3; ++i) {
    weights.push_back(Build({RandomQuantized(kDim, kDim, 128, kFourBits, 21 + i)}));
  }
  auto workspace = Poisoned<uint8_t>(LowBitWorkspaceBytes(20, kDim));
  for (const int64_t n : {1, 20}) {
    const Activations x = RandomActivations(n, kDim, 24);
    std::vector<uint16_t> expected;
    for (const bool overlap : {false, true, true, true}) {
      DeviceBuffer<__nv_bfloat16> buffers[2];
      for (auto& buffer : buffers) {
        buffer = *DeviceBuffer<__nv_bfloat16>::Allocate(n * kDim, context().stream());
      }
      for (int i = 0; i < kLinks; ++i) {
        ASSERT_OK(
            LowBitMatmul({.n_tokens = n,
                          .weights = &weights[static_cast<size_t>(i % 3)],
                          .x = i == 0 ? x.device.data() : buffers[i % 2].data(),
                          .y_bf16 = buffers[(i + 1) % 2].data(),
                          .overlap_previous = overlap,
                          .shared_part = i % 2 == 0 ? SharedPart::kSmaller : SharedPart::kLarger,
                          .workspace = workspace.data(),
                          .workspace_bytes = workspace.size_bytes(),
                          .stream = context().stream()}));
      }
      const std::vector<__nv_bfloat16> last = Download(buffers[kLinks % 2]);
      std::vector<uint16_t> bits(last.size());
      std::memcpy(bits.data(), last.data(), last.size() * sizeof(uint16_t));
      if (expected.empty()) expected = bits;
      EXPECT_EQ(bits, expected) << n << " tokens";
      EXPECT_TRUE(std::isfinite(Bf16ToFloat(bits[0])));
    }
  }
}

TEST_F(LowBitProductGpuTest, DenseIsRoundedToEightBits) {
  struct Dense {
    int64_t rows, cols;
  };
  for (const Dense& d : std::vector<Dense>{{1, 8}, {33, 896}, {1000, 200}, {64, 1536}}) {
    SCOPED_TRACE(absl::StrCat(d.rows, " x ", d.cols));
    std::vector<__nv_bfloat16> weights;
    std::vector<float> values;
    for (const float v : RandomNormal(d.rows * d.cols, 25, 0.02f)) {
      weights.push_back(__float2bfloat16(v));
      values.push_back(__bfloat162float(weights.back()));
    }
    std::fill_n(weights.begin(), std::min<int64_t>(d.cols, 128), __float2bfloat16(0.0f));
    std::fill_n(values.begin(), std::min<int64_t>(d.cols, 128), 0.0f);
    const auto device = Upload(weights);
    auto first_bad = Upload(std::vector<int64_t>{INT64_MAX});
    const absl::StatusOr<ServingMatrix> serving = ServingMatrix::Quantize(
        {.rows = d.rows, .cols = d.cols, .weights = device.data(), .first_bad = first_bad.data()},
        context().stream());
    ASSERT_OK(serving.status());
    auto unpacked = Poisoned<float>(d.rows * d.cols);
    ASSERT_OK(serving->Unpack(nullptr, unpacked.data(), context().stream()));
    const std::vector<float> rounded = Download(unpacked);
    EXPECT_EQ(Download(first_bad)[0], INT64_MAX);
    for (int64_t r = 0; r < d.rows; ++r) {
      for (int64_t begin = 0; begin < d.cols; begin += 128) {
        float largest = 0;
        const int64_t end = std::min(begin + 128, d.cols);
        for (int64_t c = begin; c < end; ++c) {
          largest = std::max(largest, std::abs(values[static_cast<size_t>(r * d.cols + c)]));
        }
        // Half a step, and what rounding the step to a half leaves of the largest weight.
        const float limit = largest / 127 * 0.5f + largest * 0.0005f + 127 * 3e-8f;
        for (int64_t c = begin; c < end; ++c) {
          const auto i = static_cast<size_t>(r * d.cols + c);
          ASSERT_LE(std::abs(rounded[i] - values[i]), limit) << r << " " << c;
        }
      }
    }
    const Activations x = RandomActivations(9, d.cols, 26);
    EXPECT_LT(RelativeError(Multiply(*serving, x.device, 9),
                            Reference(rounded, d.rows, d.cols, x.host, 9)),
              kFloatLimit);
  }
}

TEST_F(LowBitProductGpuTest, DenseNamesTheFirstThatIsNotFinite) {
  std::vector<__nv_bfloat16> weights(40 * 264, __float2bfloat16(0.5f));
  weights[9000] = __float2bfloat16(INFINITY);
  weights[7001] = __float2bfloat16(NAN);
  const auto device = Upload(weights);
  auto first_bad = Upload(std::vector<int64_t>{INT64_MAX});
  ASSERT_OK(ServingMatrix::Quantize(
                {.rows = 40, .cols = 264, .weights = device.data(), .first_bad = first_bad.data()},
                context().stream())
                .status());
  EXPECT_EQ(Download(first_bad)[0], 7001);
}

TEST_F(LowBitProductGpuTest, RefusesMatricesThatDoNotFit) {
  const Stored stored = Store(RandomQuantized(32, 192, 96, kFourBits, 27));
  const Stored codebook = Store(RandomQuantized(32, 192, 64, Width{2, StoredGrid::kCodebook}, 28));
  const auto build = [&](const std::vector<StoredLinear>& linears, int64_t cols, int bits,
                         int64_t group_size, ServingRows order = ServingRows::kStacked) {
    return ServingMatrix::Build({.linears = linears,
                                 .cols = cols,
                                 .bits = bits,
                                 .group_size = group_size,
                                 .order = order},
                                context().stream())
        .status();
  };
  const auto invalid = [](const char* what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what));
  };
  const auto unimplemented = [](const char* what) {
    return StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(what));
  };
  StoredLinear linear = stored.linear;
  EXPECT_OK(build({linear}, 192, 4, 192));
  EXPECT_THAT(build({linear}, 192, 4, 96), unimplemented("group_size: 96"));
  EXPECT_THAT(build({linear}, 192, 5, 64), invalid("bits: 5"));
  EXPECT_THAT(build({linear}, 192, 4, 80), invalid("group_size: 80"));
  EXPECT_THAT(build({linear}, 192, 4, 0), invalid("group_size: 0"));
  EXPECT_THAT(build({linear}, 200, 4, 200), invalid("200 columns"));
  EXPECT_THAT(build({}, 192, 4, 64), invalid("0 linears"));
  EXPECT_THAT(build({linear, linear, linear, linear, linear}, 192, 4, 64), invalid("5 linears"));
  EXPECT_THAT(build({codebook.linear}, 192, 4, 64), unimplemented("codebook of 4 bits"));
  EXPECT_THAT(build({linear, codebook.linear}, 192, 4, 64), invalid("codebook"));
  EXPECT_THAT(build({linear, linear, linear}, 192, 4, 64, ServingRows::kInterleaved),
              invalid("interleaved rows are those of two linears of one size, these are 3"));
  linear.rows = 40;
  EXPECT_THAT(build({linear}, 192, 4, 64), invalid("40 rows"));
  EXPECT_THAT(build({stored.linear, linear}, 192, 4, 64, ServingRows::kInterleaved),
              invalid("40 rows"));
  linear.rows = 64;
  EXPECT_THAT(build({stored.linear, linear}, 192, 4, 64, ServingRows::kInterleaved),
              invalid("different sizes"));
  linear.rows = 0;
  EXPECT_THAT(build({linear}, 192, 4, 64), invalid("0 rows"));
  linear = stored.linear;
  linear.qzeros = nullptr;
  EXPECT_THAT(build({linear}, 192, 4, 64), invalid("qzeros or zeros"));
  EXPECT_THAT(ServingMatrix::Quantize({.rows = 8, .cols = 20}, context().stream()).status(),
              invalid("20"));
  FailAllocationForTest(1);
  EXPECT_THAT(build({stored.linear}, 192, 4, 64),
              StatusIs(absl::StatusCode::kResourceExhausted, ::testing::_));
  FailAllocationForTest(0);
}

TEST_F(LowBitProductGpuTest, RefusesProductsThatDoNotFit) {
  const ServingMatrix weights = Build({RandomQuantized(64, 192, 64, kFourBits, 29)});
  const Activations x = RandomActivations(2, 192, 30);
  auto y = Poisoned<float>(2 * 64);
  const auto y_bf16 = reinterpret_cast<__nv_bfloat16*>(y.data());
  const LowBitMatmulParams good{.n_tokens = 2,
                                .weights = &weights,
                                .x = x.device.data(),
                                .y_float = y.data(),
                                .stream = context().stream()};
  const auto with = [&](auto change) {
    LowBitMatmulParams params = good;
    change(params);
    return LowBitMatmul(params);
  };
  const auto invalid = [](const char* what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what));
  };
  using P = LowBitMatmulParams;
  EXPECT_OK(LowBitMatmul(good));
  EXPECT_OK(with([](P& p) { p.n_tokens = 0; }));
  EXPECT_THAT(with([](P& p) { p.n_tokens = 65; }),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("65 tokens")));
  EXPECT_THAT(with([](P& p) { p.n_tokens = -1; }), invalid("-1 tokens"));
  EXPECT_THAT(with([](P& p) { p.x += 1; }), invalid("2 bytes off"));
  EXPECT_THAT(with([](P& p) { p.x = nullptr; }), invalid("both are null"));
  EXPECT_THAT(with([&](P& p) { p.x_float = y.data(); }), invalid("x_float"));
  EXPECT_THAT(with([&](P& p) { p.norm_weight = y.data(); }), invalid("without has_norm"));
  EXPECT_THAT(with([&](P& p) {
                p.has_norm = true;
                p.norm_weight = y.data() + 1;
              }),
              invalid("norm_weight must be aligned to 16 bytes, is 4"));
  EXPECT_THAT(with([](P& p) {
                p.has_norm = true;
                p.eps = -1;
              }),
              invalid("eps -1"));
  EXPECT_THAT(with([&](P& p) {
                p.workspace = y.data();
                p.workspace_bytes = 64;
              }),
              invalid("a workspace of 64 bytes, 2 tokens need"));
  EXPECT_THAT(with([](P& p) { p.x_stride = 196; }), invalid("196"));
  EXPECT_THAT(with([](P& p) { p.x_stride = 184; }), invalid("184"));
  EXPECT_THAT(with([](P& p) { p.y_stride = 63; }), invalid("63"));
  EXPECT_THAT(with([](P& p) { p.y_float = nullptr; }), invalid("y_float"));
  EXPECT_THAT(with([&](P& p) { p.y_bf16 = y_bf16; }), invalid("y_float"));
  EXPECT_THAT(with([&](P& p) {
                p.output = LowBitOutput::kAdd;
                p.y_float = nullptr;
                p.y_bf16 = y_bf16;
              }),
              invalid("fp32"));
  EXPECT_THAT(with([](P& p) { p.output = LowBitOutput::kSiluMul; }), invalid("interleaved"));
  EXPECT_THAT(with([](P& p) { p.output = LowBitOutput::kGeluMul; }), invalid("interleaved"));
  EXPECT_THAT(with([](P& p) { p.tuning.row_tiles = 3; }), invalid("3 row tiles"));
  EXPECT_THAT(with([](P& p) { p.rotation_block = 8; }), invalid("blocks of 8 of 192 columns"));
  EXPECT_THAT(with([](P& p) { p.rotation_block = 128; }), invalid("blocks of 128 of 192 columns"));
  const auto order = Upload(RandomOrder(200, 62));
  EXPECT_THAT(with([&](P& p) { p.input_order = order.data() + 1; }),
              invalid("input_order must be aligned to 16 bytes, is 4"));
}

}  // namespace
}  // namespace walsh::kernels::cuda
