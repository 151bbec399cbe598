#include "worker/evaluate/evaluation_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::evaluate {
namespace {

using ::testing::ElementsAre;

TEST(JoinRowsTest, KeepsNewlinesAndEmptiesBlankRows) {
  EXPECT_EQ(JoinRows(""), "");
  EXPECT_EQ(JoinRows("a\nb\n"), "a\n\n\nb\n");
  EXPECT_EQ(JoinRows(" \na\n \nb"), "\n\na\n\n\n\n\nb");
}

// What GPTQ and QuaRot evaluate on (the digest is that of the rows joined in Python).
TEST(JoinRowsTest, WikiText2) {
  WALSH_REQUIRE_DATA(path, "corpora/wiki.test.raw");
  ASSERT_OK_AND_ASSIGN(const std::string rows, ReadFile(path, 1 << 24));
  const std::string joined = JoinRows(rows);
  EXPECT_EQ(joined.size(), 1296370u);
  EXPECT_EQ(Sha256Hex(joined), "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
}

TEST(StridedWindowsTest, EachTokenIsPredictedOnce) {
  std::vector<int32_t> ids(10);
  std::iota(ids.begin(), ids.end(), 0);
  const StridedWindows overlapping(ids, 4, 2, 100);
  ASSERT_EQ(overlapping.count(), 4);
  EXPECT_THAT(overlapping.Cut(0, 4).ids,
              ElementsAre(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9));
  EXPECT_THAT(overlapping.Cut(1, 2).ids, ElementsAre(2, 3, 4, 5, 4, 5, 6, 7));
  // 1, 2, 3; then 4, 5; 6, 7; 8, 9.
  EXPECT_THAT(overlapping.FirstScored(0, 4), ElementsAre(1, 2, 2, 2));
  EXPECT_THAT(overlapping.FirstScored(2, 2), ElementsAre(2, 2));
  const StridedWindows apart(ids, 4, 4, 100);
  ASSERT_EQ(apart.count(), 2);
  EXPECT_THAT(apart.Cut(0, 2).ids, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(apart.FirstScored(0, 2), ElementsAre(1, 1));
  EXPECT_FALSE(apart.has_more()) << "two tokens are no window";
  EXPECT_TRUE(StridedWindows(ids, 4, 1, 6).has_more());
  EXPECT_FALSE(StridedWindows(ids, 4, 1, 7).has_more());
  EXPECT_EQ(StridedWindows(ids, 4, 1, 3).count(), 3);
  EXPECT_EQ(StridedWindows(ids, 10, 10, 3).count(), 1);
  EXPECT_EQ(StridedWindows(ids, 11, 1, 3).count(), 0);
}

// The widest that may be asked for: cut at once they were 1 GiB of ids.
TEST(StridedWindowsTest, OverlappingWindowsAreNoCopiesOfTheText) {
  const StridedWindows windows(std::vector<int32_t>(32768 + 8192, 7), 32768, 1, 8192);
  EXPECT_EQ(windows.count(), 8192);
  EXPECT_EQ(windows.n_ids(), 32768 + 8192);
  EXPECT_EQ(windows.Cut(8191, 1).ids.size(), 32768u);
}

}  // namespace
}  // namespace walsh::evaluate
