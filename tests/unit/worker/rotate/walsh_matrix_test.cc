#include "worker/rotate/walsh_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh::rotate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

std::span<const int8_t> Row(const std::vector<int8_t>& m, int64_t n, int64_t i) {
  return std::span(m).subspan(static_cast<size_t>(i * n), static_cast<size_t>(n));
}

// H Hᵀ = n I in integers, so that nothing hides in a tolerance.
void ExpectHadamard(const std::vector<int8_t>& h, int64_t n) {
  ASSERT_EQ(static_cast<int64_t>(h.size()), n * n);
  for (int8_t entry : h) ASSERT_TRUE(entry == 1 || entry == -1);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      const int32_t dot = std::inner_product(&h[i * n], &h[i * n] + n, &h[j * n], int32_t{0});
      ASSERT_EQ(dot, i == j ? n : 0) << "rows " << i << " and " << j << " of order " << n;
    }
  }
}

TEST(WalshMatrixTest, RowHasItsOwnIndexAsSequency) {
  for (int64_t n = 2; n <= 1024; n *= 2) {
    ASSERT_OK_AND_ASSIGN(const auto w, WalshMatrix(n));
    for (int64_t s = 0; s < n; ++s) ASSERT_EQ(Sequency(Row(w, n, s)), s) << "order " << n;
  }
}

TEST(WalshMatrixTest, IsSymmetricAndOrthogonal) {
  for (int64_t n = 2; n <= 1024; n *= 2) {
    ASSERT_OK_AND_ASSIGN(const auto w, WalshMatrix(n));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) ASSERT_EQ(Row(w, n, i)[j], Row(w, n, j)[i]);
    }
    ExpectHadamard(w, n);
  }
}

TEST(HadamardMatrixTest, NaturalOrderSequenciesOfEight) {
  ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(8));
  std::vector<int64_t> sequencies;
  for (int64_t i = 0; i < 8; ++i) sequencies.push_back(Sequency(Row(h, 8, i)));
  EXPECT_THAT(sequencies, ElementsAre(0, 7, 3, 4, 1, 6, 2, 5));
}

TEST(HadamardMatrixTest, PaleyOrders) {
  for (int64_t n : {36, 72, 144, 576}) {
    ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(n));
    ExpectHadamard(h, n);
  }
}

// The global Walsh matrix of 576 has the rows of H_36 ⊗ H_16 in ascending, not unique, sequency.
TEST(WalshMatrixTest, PaleyOrderIsSortedStablyBySequency) {
  ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(576));
  ASSERT_OK_AND_ASSIGN(const auto w, WalshMatrix(576));
  ExpectHadamard(w, 576);
  ASSERT_OK_AND_ASSIGN(const HadamardOrder order, FactorHadamardOrder(576));
  const std::vector<int32_t> rows = WalshRowOrder(order);
  for (int64_t s = 0; s < 576; ++s) {
    const auto row = Row(w, 576, s);
    const auto natural = Row(h, 576, rows[static_cast<size_t>(s)]);
    ASSERT_TRUE(std::equal(row.begin(), row.end(), natural.begin()));
    if (s == 0) continue;
    const int64_t before = Sequency(Row(w, 576, s - 1));
    ASSERT_LE(before, Sequency(row));
    if (before == Sequency(row)) {
      ASSERT_LT(rows[static_cast<size_t>(s - 1)], rows[static_cast<size_t>(s)]);
    }
  }
}

TEST(FactorHadamardOrderTest, RefusesOtherOrdersAndRecommendsGsr) {
  for (int64_t n : {0, -4, 3, 12, 20, 172, 9, 18, 960, 2304 * 9}) {
    EXPECT_THAT(FactorHadamardOrder(n),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("gsr")))
        << n;
  }
  EXPECT_THAT(HadamardMatrix(16384),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("8192")));
}

}  // namespace
}  // namespace walsh::rotate
