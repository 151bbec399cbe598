// The forward pass of each family against transformers (tests/golden/models).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/testing/golden_model.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/model/dense_model.h"

namespace walsh {
namespace {

using testing::DenseModel;
using testing::GoldenModel;

// Largest difference over the largest logit.
double RelativeDifference(const Matrix& logits, const Matrix& expected, int64_t first_row) {
  double largest = 0, difference = 0;
  for (int64_t row = 0; row < logits.rows(); ++row) {
    for (int64_t id = 0; id < logits.cols(); ++id) {
      const double wanted = expected(first_row + row, id);
      largest = std::max(largest, std::abs(wanted));
      difference = std::max(difference, std::abs(logits(row, id) - wanted));
    }
  }
  return difference / largest;
}

class GoldenFamilyTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    testing::WriteGoldenModel(GetParam(), directory_ / "model");
    golden_ = testing::ReadGoldenModel(GetParam());
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(directory_ / "model"));
    ASSERT_OK_AND_ASSIGN(model_, DenseModel::Load(*checkpoint));
  }
  int64_t n_tokens() const { return static_cast<int64_t>(golden_.tokens.size()); }

  testing::TempDir directory_;
  GoldenModel golden_;
  DenseModel model_;
  ThreadPool pool_{2};
};

TEST_P(GoldenFamilyTest, LogitsAreThoseOfTransformers) {
  ASSERT_LT(model_.config.sliding_window, n_tokens() / 2);
  const kernels::Stream streams[] = {{.backend = kernels::Backend::kRef}, {.pool = &pool_}};
  for (const kernels::Stream& stream : streams) {
    testing::Sequence sequence(model_, stream, n_tokens());
    ASSERT_OK_AND_ASSIGN(const Matrix logits, sequence.Append(golden_.tokens));
    EXPECT_LT(RelativeDifference(logits, golden_.logits, 0), 1e-4);
  }
}

// A prompt in pieces and then token by token: what slid out of the window is still in the cache.
TEST_P(GoldenFamilyTest, AndSoAreThoseOfDecoding) {
  testing::Sequence sequence(model_, {}, n_tokens());
  const std::span<const int32_t> tokens(golden_.tokens);
  int64_t first = 0;
  while (first < n_tokens()) {
    const int64_t n = first == 0 ? 13 : first == 13 ? 37 : 1;
    ASSERT_OK_AND_ASSIGN(
        const Matrix logits,
        sequence.Append(tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(n))));
    EXPECT_LT(RelativeDifference(logits, golden_.logits, first), 1e-4) << "from " << first;
    first += n;
  }
}

INSTANTIATE_TEST_SUITE_P(Families, GoldenFamilyTest, ::testing::ValuesIn(testing::GoldenFamilies()),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace walsh
