#include "worker/rotate/walsh_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/rotate/hadamard_core.h"

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

// Of the widths that models have: m · 2^k with these m, and the larger cores of Qwen2.5-7B's,
// Qwen3-14B's and Qwen2.5-72B's intermediate widths.
TEST(HadamardMatrixTest, EveryNamedCore) {
  for (int64_t m : {12, 20, 28, 36, 44, 52, 60, 108, 140, 172, 148, 68, 924}) {
    SCOPED_TRACE(m);
    ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(m));
    ExpectHadamard(h, m);
  }
}

TEST(HadamardMatrixTest, EveryCoreUpTo256) {
  std::vector<int64_t> missing;
  for (int64_t m = 12; m <= 256; m += 8) {
    if (!HasHadamardCore(m)) {
      missing.push_back(m);
      continue;
    }
    SCOPED_TRACE(m);
    ExpectHadamard(HadamardCore(m), m);
  }
  // Paley's constructions leave these, and Williamson's, which gives all but 236, is built for
  // 172 alone.
  EXPECT_THAT(missing, ElementsAre(92, 116, 156, 188, 236));
}

TEST(HadamardMatrixTest, ProductsWithSylvesters) {
  for (int64_t n : {24, 72, 144, 344, 576, 880, 960}) {
    ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(n));
    ExpectHadamard(h, n);
  }
}

// A global Walsh matrix with a core has the rows of H_m ⊗ H_2^k in ascending, not unique, sequency.
TEST(WalshMatrixTest, RowsWithACoreAreSortedStablyBySequency) {
  for (int64_t n : {12, 40, 344, 576}) {
    SCOPED_TRACE(n);
    ASSERT_OK_AND_ASSIGN(const auto h, HadamardMatrix(n));
    ASSERT_OK_AND_ASSIGN(const auto w, WalshMatrix(n));
    ExpectHadamard(w, n);
    ASSERT_OK_AND_ASSIGN(const HadamardOrder order, FactorHadamardOrder(n));
    const std::vector<int32_t> rows = WalshRowOrder(order);
    for (int64_t s = 0; s < n; ++s) {
      const auto row = Row(w, n, s);
      const auto natural = Row(h, n, rows[static_cast<size_t>(s)]);
      ASSERT_TRUE(std::equal(row.begin(), row.end(), natural.begin()));
      if (s == 0) continue;
      const int64_t before = Sequency(Row(w, n, s - 1));
      ASSERT_LE(before, Sequency(row));
      if (before == Sequency(row)) {
        ASSERT_LT(rows[static_cast<size_t>(s - 1)], rows[static_cast<size_t>(s)]);
      }
    }
  }
}

// The smallest core: as much of the width as can be is Sylvester's.
TEST(FactorHadamardOrderTest, CoreIsFourTimesTheOddPart) {
  struct Case {
    int64_t n, core;
    int log2_sylvester;
  };
  for (const Case& c : {Case{4096, 1, 12}, Case{576, 36, 4}, Case{11008, 172, 6},
                        Case{14336, 28, 9}, Case{2560, 20, 7}, Case{18944, 148, 7}}) {
    ASSERT_OK_AND_ASSIGN(const HadamardOrder order, FactorHadamardOrder(c.n));
    EXPECT_EQ(order.core, c.core) << c.n;
    EXPECT_EQ(order.log2_sylvester, c.log2_sylvester) << c.n;
  }
}

TEST(FactorHadamardOrderTest, RefusesOtherOrdersAndRecommendsGsr) {
  for (int64_t n : {0, -4, 3, 9, 18, 86, 92, 116, 13696, 4 * 1021}) {
    EXPECT_THAT(FactorHadamardOrder(n),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("gsr")))
        << n;
  }
  EXPECT_THAT(HadamardMatrix(16384),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("8192")));
}

}  // namespace
}  // namespace walsh::rotate
