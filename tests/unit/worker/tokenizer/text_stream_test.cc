#include "worker/tokenizer/text_stream.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/utf8.h"
#include "tests/testing/random_seed.h"

namespace walsh {
namespace {

constexpr int32_t kEndToken = 256;  // special
constexpr int32_t kFirstMore = 257;

// One token for each byte, a special one, and more that the test gives.
class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(std::vector<std::string> more = {}, bool strips_leading_space = false)
      : more_(std::move(more)), strips_leading_space_(strips_leading_space) {}

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view,
                                              const EncodeOptions&) const override {
    return absl::UnimplementedError("not needed");
  }
  std::string TokenBytes(int32_t id, bool skip_special) const override {
    if (IsSpecial(id)) return skip_special ? "" : "<end>";
    return id < kEndToken ? std::string(1, static_cast<char>(id))
                          : more_.at(static_cast<size_t>(id - kFirstMore));
  }
  std::string Decode(std::span<const int32_t>, bool) const override { return ""; }
  bool strips_leading_space() const override { return strips_leading_space_; }
  int32_t vocab_size() const override { return kFirstMore + static_cast<int32_t>(more_.size()); }
  int32_t bos() const override { return -1; }
  int32_t eos() const override { return kEndToken; }
  bool IsSpecial(int32_t id) const override { return id == kEndToken; }
  int32_t TokenId(std::string_view) const override { return -1; }

 private:
  std::vector<std::string> more_;
  const bool strips_leading_space_;
};

// Streams `bytes` one at a time; every chunk must be valid UTF-8.
std::string StreamBytes(TextStream& stream, const std::string& bytes) {
  std::string out;
  for (const char byte : bytes) {
    const std::string chunk = stream.Append(static_cast<uint8_t>(byte));
    EXPECT_TRUE(IsValidUtf8(chunk));
    out += chunk;
  }
  return out;
}

TEST(TextStreamTest, HoldsACodePointUntilItIsWhole) {
  const ByteTokenizer tokenizer;
  for (const std::string whole : {"é", "€", "😀"}) {
    TextStream stream(&tokenizer, {});
    EXPECT_EQ(StreamBytes(stream, whole.substr(0, whole.size() - 1)), "");
    EXPECT_EQ(stream.Append(static_cast<uint8_t>(whole.back())), whole);
    EXPECT_EQ(stream.Finish(), "");
  }
}

TEST(TextStreamTest, HopelessBytesBecomeReplacementsAtOnce) {
  const ByteTokenizer tokenizer;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\x80", "\uFFFD"},                       // lone continuation
      {"\xC0\xAF", "\uFFFD\uFFFD"},             // overlong
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},   // surrogate
      {"\xF5", "\uFFFD"},                       // above U+10FFFF
      {"\xE2\x82z", "\uFFFDz"},                 // cut short by a letter
      {"\xF0\x9F\xF0\x9F\x98\x80", "\uFFFD😀"},  // cut short by a good one
  };
  for (const auto& [bytes, text] : cases) {
    TextStream stream(&tokenizer, {});
    EXPECT_EQ(StreamBytes(stream, bytes), text);
    EXPECT_EQ(stream.Finish(), "");
  }
}

TEST(TextStreamTest, ACutTailBecomesAReplacementAtTheEnd) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {});
  EXPECT_EQ(StreamBytes(stream, "a\xF0\x9F\x98"), "a");
  EXPECT_EQ(stream.Finish(), "\uFFFD");
}

TEST(TextStreamTest, NothingOfAStopStringLeaksWhereverItIsSplit) {
  const std::string stop = "<|stop é|>";
  const std::string text = "text";
  for (size_t first = 1; first < stop.size(); ++first) {
    for (size_t second = first; second < stop.size(); ++second) {
      const ByteTokenizer tokenizer({text + stop.substr(0, first),
                                     stop.substr(first, second - first),
                                     stop.substr(second) + "more"});
      TextStream stream(&tokenizer, {.stop = {stop}});
      EXPECT_EQ(stream.Append(kFirstMore), text);
      EXPECT_EQ(stream.Append(kFirstMore + 1), "");
      EXPECT_EQ(stream.Append(kFirstMore + 2), "");
      EXPECT_EQ(stream.matched_stop(), stop);
      EXPECT_EQ(stream.Append('x'), "");
      EXPECT_EQ(stream.Finish(), "");
    }
  }
}

TEST(TextStreamTest, WhatOnlyBeganLikeAStopStringIsReleased) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {.stop = {"aab"}});
  EXPECT_EQ(stream.Append('a'), "");
  EXPECT_EQ(stream.Append('a'), "");
  EXPECT_EQ(stream.Append('a'), "a");
  EXPECT_EQ(stream.Append('c'), "aac");
  EXPECT_EQ(stream.Append('a'), "");
  EXPECT_EQ(stream.Finish(), "a");
  EXPECT_EQ(stream.matched_stop(), "");
}

TEST(TextStreamTest, TheStopStringThatIsCompleteFirstCounts) {
  const ByteTokenizer tokenizer({"abcd"});
  TextStream whole(&tokenizer, {.stop = {"abcd", "bc", "c"}});
  EXPECT_EQ(whole.Append(kFirstMore), "a");
  EXPECT_EQ(whole.matched_stop(), "bc");  // ends with "c", and is longer
  TextStream split(&tokenizer, {.stop = {"abcd", "bc", "c"}});
  EXPECT_EQ(StreamBytes(split, "abcd"), "a");
  EXPECT_EQ(split.matched_stop(), "bc");
}

TEST(TextStreamTest, StopStringIncludedOnRequest) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {.stop = {"\n\n", ""}, .include_stop = true});
  EXPECT_EQ(StreamBytes(stream, "a\n\nb"), "a\n\n");
}

TEST(TextStreamTest, SpecialTokensAreSkippedOrShown) {
  const ByteTokenizer tokenizer;
  TextStream skips(&tokenizer, {});
  EXPECT_EQ(skips.Append(kEndToken), "");
  TextStream shows(&tokenizer, {.skip_special_tokens = false});
  EXPECT_EQ(shows.Append(kEndToken), "<end>");
}

TEST(TextStreamTest, LeadingSpaceGoesOnlyAtTheStartOfAText) {
  const ByteTokenizer tokenizer({" Once"}, /*strips_leading_space=*/true);
  TextStream continues(&tokenizer, {});
  EXPECT_EQ(continues.Append(kFirstMore), " Once");
  TextStream begins(&tokenizer, {.continues_text = false});
  EXPECT_EQ(begins.Append(kEndToken), "");
  EXPECT_EQ(begins.Append(kFirstMore), "Once");
  EXPECT_EQ(begins.Append(kFirstMore), " Once");
}

// Goal: rows G1 to G5 of the failure catalogue. Method: random bytes, rich in pieces of valid and
// invalid UTF-8 and of the stop strings, fall into random tokens. The stream must give what a plain
// search finds in the whole text, and must never hold more than it may.
std::string RandomBytes(std::mt19937_64& random, const std::vector<std::string>& pieces) {
  std::string bytes;
  const int n_pieces = static_cast<int>(random() % 12);
  for (int i = 0; i < n_pieces; ++i) {
    if (random() % 3 == 0) {
      bytes.push_back(static_cast<char>(random()));
    } else {
      const std::string& piece = pieces[random() % pieces.size()];
      bytes += random() % 4 == 0 ? piece.substr(0, random() % piece.size()) : piece;
    }
  }
  return bytes;
}

// The end of the stop string that is complete first, and its size; npos when there is none.
std::pair<size_t, size_t> FirstStop(const std::string& text,
                                    const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (stop.size() > longest && std::string_view(text).substr(0, end).ends_with(stop)) {
        longest = stop.size();
      }
    }
    if (longest > 0) return {end, longest};
  }
  return {std::string::npos, 0};
}

TEST(TextStreamTest, RandomSequencesGiveWhatTheWholeTextGives) {
  std::mt19937_64 random(testing::RandomSeed());
  const std::vector<std::string> pieces = {
      "a",        "ab",           "é",   "€",  "😀",   "日本",  "\xE2\x82",
      "\xF0\x9F", "\xED\xA0\x80", "<e>", "\n", "aab", "\uFFFD"};
  const std::vector<std::vector<std::string>> stop_sets = {
      {}, {"<e>"}, {"aab", "b😀"}, {"é\n", "\n\n", "aaab"}, {"\uFFFD\uFFFD"}, {"日本a", "本"}};
  for (int round = 0; round < 1'000'000; ++round) {
    const std::vector<std::string>& stops = stop_sets[random() % stop_sets.size()];
    const bool include_stop = random() % 2 == 0;
    const std::string bytes = RandomBytes(random, pieces);
    std::vector<std::string> tokens;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = 1 + random() % 5;
      tokens.push_back(bytes.substr(at, n));
      at += n;
    }
    const ByteTokenizer tokenizer(tokens);
    TextStream stream(&tokenizer, {.stop = stops, .include_stop = include_stop});

    const std::string whole = ReplaceInvalidUtf8(bytes);
    const auto [stop_end, stop_size] = FirstStop(whole, stops);
    std::string out;
    std::string fed;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const std::string chunk = stream.Append(kFirstMore + static_cast<int32_t>(i));
      ASSERT_TRUE(IsValidUtf8(chunk)) << "round " << round;
      out += chunk;
      fed += tokens[i];
      if (stops.empty()) {
        const std::string certain = fed.substr(0, fed.size() - IncompleteUtf8Suffix(fed));
        ASSERT_EQ(out, ReplaceInvalidUtf8(certain)) << "round " << round;
      }
    }
    out += stream.Finish();
    const std::string expected = stop_end == std::string::npos
                                     ? whole
                                     : whole.substr(0, stop_end - (include_stop ? 0 : stop_size));
    ASSERT_EQ(out, expected) << "round " << round;
    ASSERT_EQ(stream.matched_stop().size(), stop_size) << "round " << round;
  }
}

}  // namespace
}  // namespace walsh
