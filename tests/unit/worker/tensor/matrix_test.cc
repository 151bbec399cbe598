#include "worker/tensor/matrix.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>

namespace walsh {
namespace {

TEST(MatrixTest, StartsAtZeroAndAligned) {
  for (const int64_t cols : {0, 1, 15, 16, 17, 172}) {
    const Matrix m(7, cols);
    EXPECT_EQ(m.size(), 7 * cols);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(m.data()) % 64, 0u);
    for (const float value : m.span()) ASSERT_EQ(value, 0.0f);
  }
}

TEST(MatrixTest, CopiesDeeply) {
  Matrix a(2, 3);
  a(1, 2) = 5.0f;
  Matrix b = a.Copy();
  b(1, 2) = 7.0f;
  EXPECT_EQ(a(1, 2), 5.0f);
  EXPECT_EQ(a.row(1)[2], 5.0f);
  const Matrix c = std::move(b);
  EXPECT_EQ(c(1, 2), 7.0f);
}

TEST(MatrixTest, DefaultIsEmpty) {
  const Matrix m;
  EXPECT_TRUE(m.empty());
  EXPECT_EQ(m.rows(), 0);
  EXPECT_TRUE(m.span().empty());
}

}  // namespace
}  // namespace walsh
