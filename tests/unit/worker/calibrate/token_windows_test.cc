#include "worker/calibrate/token_windows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>

#include "common/utf8.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/calibrate/byte_tokenizer.h"
#include "worker/io/gguf_vocabulary.h"

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

TEST(EncodeSamplesTest, OnlyTheTokenizersOwnBosIsLeftOut) {
  const SampleSet set{{{"ab", false}, {"<s>c<s>d", true}, {"one two", false}, {"e", false}}, 0};
  constexpr int32_t kBos = ByteTokenizer::kBos;
  // In one piece and in slices, the third sample has none; the chat keeps what its template wrote.
  for (const int64_t slice_bytes : {100, 3}) {
    ASSERT_OK_AND_ASSIGN(const TokenStream stream,
                         EncodeSamples(set, ByteTokenizer(true), 257, 3, 100, {},
                                       {.skip_bos = true, .slice_bytes = slice_bytes}));
    EXPECT_THAT(stream.ids, ElementsAre('a', 'b', kBos, 'c', kBos, 'd', 'o', 'n', 'e', ' ', 't',
                                        'w', 'o', 'e'));
  }
  // As many ids as are wanted are counted without it.
  ASSERT_OK_AND_ASSIGN(const TokenStream three,
                       EncodeSamples({{{"ab", false}, {"cd", false}, {"ef", false}}, 0},
                                     ByteTokenizer(true), 257, 2, 3, {}, {.skip_bos = true}));
  EXPECT_THAT(three.ids, ElementsAre('a', 'b', 'c', 'd'));
}

TEST(EncodeSamplesTest, StopsWhenThereIsEnough) {
  const SampleSet set{{{"abc", false}, {"def", false}, {"ghi", false}}, 0};
  ASSERT_OK_AND_ASSIGN(const TokenStream stream,
                       EncodeSamples(set, ByteTokenizer(false), 257, 2, 4));
  EXPECT_EQ(stream.ids.size(), 6);
  EXPECT_EQ(stream.kept, 2);
  EXPECT_EQ(stream.left_over, 1);
}

constexpr int64_t kNoLimit = int64_t{1} << 40;

TEST(EncodeSamplesTest, SlicesHaveOneBosAndOneEosBetweenThem) {
  constexpr int32_t kEos = 7;
  const SampleSet set{{{"one two three  four\n five six", false}}, 0};
  const ByteTokenizer tokenizer(true, kEos);
  ASSERT_OK_AND_ASSIGN(const TokenStream whole, EncodeSamples(set, tokenizer, 257, 2, kNoLimit));
  EXPECT_EQ(whole.ids.back(), kEos);
  for (const int64_t slice_bytes : {1, 2, 3, 5, 8, 13, 20}) {
    ASSERT_OK_AND_ASSIGN(const TokenStream sliced, EncodeSamples(set, tokenizer, 257, 2, kNoLimit,
                                                                 {}, {.slice_bytes = slice_bytes}));
    EXPECT_EQ(sliced.ids, whole.ids) << slice_bytes;
  }
  // What is not wanted is not encoded, and a text without its end gets no EOS.
  ASSERT_OK_AND_ASSIGN(const TokenStream start,
                       EncodeSamples(set, tokenizer, 257, 2, 5, {}, {.slice_bytes = 4}));
  EXPECT_EQ(start.ids, std::vector<int32_t>(whole.ids.begin(), whole.ids.begin() + 8));
  EXPECT_EQ(start.kept, 1);
}

TEST(EncodeSamplesTest, AsksBeforeEachSliceAndStopsWhenTold) {
  const SampleSet set{{{"one two three four", false}, {"five", false}}, 0};
  const ByteTokenizer tokenizer(false);
  int n_asked = 0;
  const auto ask = [&] {
    return ++n_asked == 4 ? absl::CancelledError("enough") : absl::OkStatus();
  };
  EXPECT_THAT(EncodeSamples(set, tokenizer, 257, 2, kNoLimit, ask, {.slice_bytes = 1}),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
  EXPECT_EQ(n_asked, 4);
}

TEST(EncodeSamplesTest, TextWithoutSpacesHasSlicesToo) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += "日本語";
  for (const bool has_lines : {false, true}) {
    if (has_lines) text.insert(303, "\n");
    const SampleSet set{{{text, false}}, 0};
    int n_asked = 0;
    const auto ask = [&] {
      ++n_asked;
      return absl::OkStatus();
    };
    const ByteTokenizer tokenizer(false);
    ASSERT_OK_AND_ASSIGN(const TokenStream whole, EncodeSamples(set, tokenizer, 257, 2, kNoLimit));
    ASSERT_OK_AND_ASSIGN(const TokenStream sliced, EncodeSamples(set, tokenizer, 257, 2, kNoLimit,
                                                                 ask, {.slice_bytes = 100}));
    EXPECT_EQ(sliced.ids, whole.ids);
    // 399, 399 and 102 bytes; or 304, 399 and 198.
    EXPECT_EQ(n_asked, 3);
    // No more than the first slice is encoded for a few ids.
    ASSERT_OK_AND_ASSIGN(const TokenStream start,
                         EncodeSamples(set, tokenizer, 257, 2, 5, {}, {.slice_bytes = 100}));
    EXPECT_EQ(start.ids.size(), has_lines ? 304 : 399);
  }
}

// Slices begin where every tokenizer begins anew.
void ExpectSlicesGiveTheWhole(const TokenizerSource& source) {
  WALSH_REQUIRE_DATA(path, "corpora/wiki.test.raw");
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  text.resize(400'000);
  while (!IsValidUtf8(text)) text.pop_back();
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
  const SampleSet set{{{text, false}}, 0};
  const int64_t vocab = tokenizer->vocab_size();
  ASSERT_OK_AND_ASSIGN(const TokenStream whole, EncodeSamples(set, *tokenizer, vocab, 2, kNoLimit,
                                                              {}, {.slice_bytes = kNoLimit}));
  for (const int64_t slice_bytes : {97, 5000}) {
    ASSERT_OK_AND_ASSIGN(
        const TokenStream sliced,
        EncodeSamples(set, *tokenizer, vocab, 2, kNoLimit, {}, {.slice_bytes = slice_bytes}));
    EXPECT_TRUE(sliced.ids == whole.ids) << "slices of " << slice_bytes;
  }
  ASSERT_OK_AND_ASSIGN(const TokenStream start,
                       EncodeSamples(set, *tokenizer, vocab, 2, 3000, {}, {.slice_bytes = 5000}));
  ASSERT_GE(start.ids.size(), 3000);
  ASSERT_LT(start.ids.size(), whole.ids.size() / 2);
  EXPECT_TRUE(std::equal(start.ids.begin(), start.ids.end(), whole.ids.begin()));
}

std::string Contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST(EncodeSlicesTest, TokenizerJson) {
  for (const char* name : {"llama3", "qwen3"}) {
    WALSH_REQUIRE_DATA(folder, std::string("tokenizers/") + name);
    SCOPED_TRACE(name);
    TokenizerSource source;
    source.tokenizer_json = Contents(folder + "/tokenizer.json");
    source.tokenizer_config_json = Contents(folder + "/tokenizer_config.json");
    ExpectSlicesGiveTheWhole(source);
  }
}

TEST(EncodeSlicesTest, SentencePieceModel) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama2/tokenizer.model");
  TokenizerSource source;
  source.sentencepiece_model = Contents(path);
  ExpectSlicesGiveTheWhole(source);
}

TEST(EncodeSlicesTest, GgufVocabularies) {
  for (const char* name : {"ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-spm.gguf"}) {
    WALSH_REQUIRE_DATA(path, std::string("tokenizer-vectors/") + name);
    SCOPED_TRACE(name);
    TokenizerSource source;
    ASSERT_OK_AND_ASSIGN(source.gguf, ReadGgufVocabulary(path));
    ExpectSlicesGiveTheWhole(source);
    source.gguf->add_space_prefix = false;
    ExpectSlicesGiveTheWhole(source);
  }
  WALSH_REQUIRE_SMOLLM2(path);
  TokenizerSource source;
  ASSERT_OK_AND_ASSIGN(source.gguf, ReadGgufVocabulary(path));
  ExpectSlicesGiveTheWhole(source);
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
