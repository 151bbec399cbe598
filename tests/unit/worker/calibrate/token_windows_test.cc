#include "worker/calibrate/token_windows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/calibrate/byte_tokenizer.h"

namespace walsh::calibrate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::walsh::testing::ByteTokenizer;
using ::walsh::testing::StatusIs;

TEST(EncodeSamplesTest, EachSampleByTheTokenizersOwnRule) {
  const SampleSet set{{{"ab", false}, {"<s>c", true}, {"<s>", false}}, 4};
  ASSERT_OK_AND_ASSIGN(const TokenStream stream,
                       EncodeSamples(set, ByteTokenizer(true), 257, 3, 100));
  constexpr int32_t kBos = ByteTokenizer::kBos;
  // A chat brings its BOS; a text gets one, and cannot spell one.
  EXPECT_THAT(stream.ids, ElementsAre(kBos, 'a', 'b', kBos, 'c', kBos, '<', 's', '>'));
  EXPECT_EQ(stream.kept, 3);
  EXPECT_EQ(stream.n_short, 1);
  EXPECT_EQ(stream.dropped, 4);
  EXPECT_EQ(stream.left_over, 0);
}

TEST(EncodeSamplesTest, StopsWhenThereIsEnough) {
  const SampleSet set{{{"abc", false}, {"def", false}, {"ghi", false}}, 0};
  ASSERT_OK_AND_ASSIGN(const TokenStream stream,
                       EncodeSamples(set, ByteTokenizer(false), 257, 2, 4));
  EXPECT_EQ(stream.ids.size(), 6);
  EXPECT_EQ(stream.kept, 2);
  EXPECT_EQ(stream.left_over, 1);
}

TEST(EncodeSamplesTest, RefusesIdsWithoutEmbedding) {
  const SampleSet set{{{"abc", false}}, 0};
  EXPECT_THAT(EncodeSamples(set, ByteTokenizer(false), 98, 2, 4),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("98")));
}

TEST(CutWindowsTest, WholeWindowsFromTheStart) {
  std::vector<int32_t> ids(11);
  std::iota(ids.begin(), ids.end(), 0);
  const TokenWindows windows = CutWindows(ids, 4, 100);
  ASSERT_EQ(windows.count(), 2);
  EXPECT_THAT(windows.window(1), ElementsAre(4, 5, 6, 7));
  EXPECT_EQ(CutWindows(ids, 4, 1).count(), 1);
  EXPECT_EQ(CutWindows(ids, 12, 1).count(), 0);
}

TEST(FingerprintTest, DependsOnIdsAndOnTheCut) {
  const std::vector<int32_t> ids = {1, 2, 3, 4}, other = {1, 2, 3, 5};
  const std::string fingerprint = Fingerprint(CutWindows(ids, 2, 2));
  EXPECT_EQ(fingerprint.size(), 64);
  EXPECT_EQ(fingerprint, Fingerprint(CutWindows(ids, 2, 2)));
  EXPECT_NE(fingerprint, Fingerprint(CutWindows(ids, 4, 1)));
  EXPECT_NE(fingerprint, Fingerprint(CutWindows(other, 2, 2)));
}

}  // namespace
}  // namespace walsh::calibrate
