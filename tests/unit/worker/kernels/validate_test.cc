#include "worker/kernels/validate.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels {
namespace {

using ::testing::HasSubstr;

MATCHER_P(IsInvalid, text, "") {
  *result_listener << arg.ToString();
  return arg.code() == absl::StatusCode::kInvalidArgument &&
         ::testing::ExplainMatchResult(HasSubstr(text), std::string(arg.message()),
                                       result_listener);
}

class ValidateTest : public ::testing::Test {
 protected:
  std::vector<float> data_ = std::vector<float>(64);
  float* f_ = data_.data();
  std::vector<int32_t> ids_ = std::vector<int32_t>(8);
};

TEST_F(ValidateTest, Matmul) {
  const MatmulParams good{.n_tokens = 2,
                          .in = 3,
                          .out = 4,
                          .x = f_,
                          .x_stride = 3,
                          .weights = f_,
                          .y = f_,
                          .y_stride = 4};
  EXPECT_OK(Validate(good));
  MatmulParams p = good;
  p.n_tokens = -1;
  EXPECT_THAT(Validate(p), IsInvalid("Matmul: n_tokens must be in [0, 2147483647], is -1"));
  p = good;
  p.in = int64_t{1} << 40;
  EXPECT_THAT(Validate(p), IsInvalid("in must be in"));
  p = good;
  p.x_stride = 2;
  EXPECT_THAT(Validate(p), IsInvalid("x_stride must be in [3, 2147483647], is 2"));
  p = good;
  p.y_stride = 3;
  EXPECT_THAT(Validate(p), IsInvalid("y_stride"));
  p = good;
  p.weights = nullptr;
  EXPECT_THAT(Validate(p), IsInvalid("weights is null"));
  p.out = 0;  // nothing to read then
  EXPECT_OK(Validate(p));
  // The operation itself refuses, on every backend.
  p = good;
  p.x = nullptr;
  EXPECT_THAT(Matmul(p, {.backend = Backend::kRef}), IsInvalid("x is null"));
  EXPECT_THAT(Matmul(p, {.backend = Backend::kCpu}), IsInvalid("x is null"));
}

TEST_F(ValidateTest, GramAndSubtractProduct) {
  EXPECT_THAT(
      Validate(CrossGramParams{
          .n_tokens = 1, .dim = 4, .x = f_, .x_stride = 4, .y = f_, .y_stride = 3, .c = f_}),
      IsInvalid("CrossGram: y_stride"));
  EXPECT_THAT(Validate(CrossGramParams{
                  .n_tokens = 1, .dim = 4, .x = f_, .x_stride = 4, .y = f_, .y_stride = 4}),
              IsInvalid("CrossGram: c"));
  EXPECT_THAT(Validate(GramParams{.n_tokens = 1, .dim = 4, .x = f_, .x_stride = 3, .h = f_}),
              IsInvalid("Gram: x_stride"));
  EXPECT_THAT(Validate(GramParams{.n_tokens = 1, .dim = 4, .x = f_, .x_stride = 4}),
              IsInvalid("h is null"));
  EXPECT_THAT(Validate(SubtractProductParams{.m = 2,
                                             .n = 2,
                                             .k = 2,
                                             .a = f_,
                                             .a_stride = 2,
                                             .b = f_,
                                             .b_stride = 1,
                                             .c = f_,
                                             .c_stride = 2}),
              IsInvalid("SubtractProduct: b_stride must be in [2"));
}

TEST_F(ValidateTest, Elementwise) {
  EXPECT_THAT(Validate(RmsNormParams{.n_tokens = 1, .dim = 4, .x = f_, .eps = -1, .y = f_}),
              IsInvalid("eps"));
  EXPECT_THAT(Validate(RmsNormParams{.n_tokens = 1,
                                     .dim = 4,
                                     .x = f_,
                                     .eps = std::numeric_limits<float>::quiet_NaN(),
                                     .y = f_}),
              IsInvalid("eps must be finite"));
  EXPECT_THAT(Validate(AddParams{.n = -1}), IsInvalid("Add: n"));
  EXPECT_THAT(Validate(SiluMultiplyParams{.n_tokens = 1,
                                          .dim = 2,
                                          .gate = f_,
                                          .gate_stride = 2,
                                          .up = f_,
                                          .up_stride = 1,
                                          .y = f_,
                                          .y_stride = 2}),
              IsInvalid("up_stride"));
}

TEST_F(ValidateTest, Rope) {
  const RopeParams good{.n_tokens = 2,
                        .n_heads = 1,
                        .head_dim = 4,
                        .positions = ids_.data(),
                        .inverse_frequencies = f_,
                        .x = f_,
                        .x_stride = 4};
  EXPECT_OK(Validate(good));
  RopeParams p = good;
  p.head_dim = 3;
  EXPECT_THAT(Validate(p), IsInvalid("head_dim must be even, is 3"));
  ids_[1] = -5;
  EXPECT_THAT(Validate(good), IsInvalid("positions[1] must be in [0, 2147483647), is -5"));
}

TEST_F(ValidateTest, Attention) {
  const AttentionParams good{.n_new = 1,
                             .n_heads = 4,
                             .n_kv_heads = 2,
                             .head_dim = 2,
                             .scale = 1,
                             .q = f_,
                             .q_stride = 8,
                             .k = f_,
                             .v = f_,
                             .kv_stride = 4,
                             .y = f_,
                             .y_stride = 8};
  EXPECT_OK(Validate(good));
  AttentionParams p = good;
  p.n_kv_heads = 3;
  EXPECT_THAT(Validate(p), IsInvalid("n_heads must be a multiple of n_kv_heads 3, is 4"));
  p = good;
  p.n_kv_heads = 0;
  EXPECT_THAT(Validate(p), IsInvalid("n_kv_heads must be in [1"));
  p = good;
  p.n_past = -1;
  EXPECT_THAT(Validate(p), IsInvalid("n_past"));
  p = good;
  ids_[0] = 0;
  ids_[1] = -1;
  p.blocks = ids_.data();
  p.block_stride = 16 * 4;
  EXPECT_OK(Validate(p));
  p.n_past = 16;
  EXPECT_THAT(Validate(p), IsInvalid("blocks[1] must be in [0, 2147483647), is -1"));
  p = good;
  p.blocks = ids_.data();
  p.block_stride = 63;
  EXPECT_THAT(Validate(p), IsInvalid("block_stride must be in [64, 2147483647], is 63"));
  p = good;
  p.v = nullptr;
  EXPECT_THAT(Validate(p), IsInvalid("v is null"));
  const std::vector<AttentionParams> batch = {good, p};
  EXPECT_THAT(AttentionBatch(batch, {}), IsInvalid("v is null"));
}

TEST_F(ValidateTest, BlockWalsh) {
  EXPECT_THAT(
      Validate(BlockWalshParams{.rows = 1, .cols = 12, .block = 6, .x = f_, .x_stride = 12}),
      IsInvalid("block must be a power of two, is 6"));
  EXPECT_THAT(
      Validate(BlockWalshParams{.rows = 1, .cols = 12, .block = 8, .x = f_, .x_stride = 12}),
      IsInvalid("cols must be a multiple of block 8, is 12"));
  EXPECT_THAT(Validate(BlockWalshParams{.rows = 1, .cols = 12, .x = f_, .x_stride = 12}),
              IsInvalid("block must be in [1"));
}

TEST_F(ValidateTest, CrossEntropy) {
  double loss = 0;
  ids_[0] = 4;
  EXPECT_THAT(Validate(CrossEntropyParams{
                  .n_tokens = 1, .vocab = 4, .logits = f_, .targets = ids_.data(), .loss = &loss}),
              IsInvalid("targets[0] must be in [0, 4), is 4"));
}

TEST_F(ValidateTest, KlDivergence) {
  double divergence = 0;
  EXPECT_THAT(
      Validate(KlDivergenceParams{
          .n_tokens = 1, .vocab = 4, .reference = f_, .logits = f_, .divergence = &divergence}),
      IsInvalid("agrees is null"));
}

TEST_F(ValidateTest, PackedMatmul) {
  EXPECT_THAT(
      Validate(PackedMatmulParams{.n_tokens = 1, .x = f_, .x_stride = 8, .y = f_, .y_stride = 8}),
      IsInvalid("weights is null"));
  ASSERT_OK_AND_ASSIGN(const PackedMatrix narrow, PackedMatrix::PackDense8(Matrix(2, 4)));
  ASSERT_OK_AND_ASSIGN(const PackedMatrix wide, PackedMatrix::PackDense8(Matrix(2, 8)));
  const PackedMatmulParams good{
      .n_tokens = 1, .x = f_, .x_stride = 8, .weights = &narrow, .y = f_, .y_stride = 8};
  EXPECT_OK(Validate(good));
  PackedMatmulParams other = good;
  other.weights = &wide;
  const std::vector<PackedMatmulParams> batch = {good, other};
  EXPECT_THAT(PackedMatmulBatch(batch, {}), IsInvalid("must have 4 columns, have 8"));
}

}  // namespace
}  // namespace walsh::kernels
