#include "common/utf8.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace walsh {
namespace {

std::string Bytes(std::initializer_list<int> bytes) {
  std::string text;
  for (const int byte : bytes) text.push_back(static_cast<char>(byte));
  return text;
}

// The bit layout of RFC 3629, written again so that the tests do not ask the code about itself.
std::string Encode(uint32_t c) {
  const int i = static_cast<int>(c);
  if (c < 0x80) return Bytes({i});
  if (c < 0x800) return Bytes({0xC0 + i / 64, 0x80 + i % 64});
  if (c < 0x10000) return Bytes({0xE0 + i / 4096, 0x80 + i / 64 % 64, 0x80 + i % 64});
  return Bytes({0xF0 + i / 262144, 0x80 + i / 4096 % 64, 0x80 + i / 64 % 64, 0x80 + i % 64});
}

bool IsScalar(uint32_t c) { return c <= 0x10FFFF && !(c >= 0xD800 && c <= 0xDFFF); }

TEST(Utf8Test, EveryCodePointRoundTrips) {
  for (uint32_t c = 0; c <= 0x10FFFF; ++c) {
    if (!IsScalar(c)) continue;
    std::string text;
    AppendUtf8(c, text);
    ASSERT_EQ(text, Encode(c)) << c;
    ASSERT_TRUE(IsValidUtf8(text)) << c;
    size_t pos = 0;
    ASSERT_EQ(NextCodePoint(text, &pos), c);
    ASSERT_EQ(pos, text.size());
    for (size_t n = 1; n < text.size(); ++n) {
      const std::string begun = "a" + text.substr(0, n);
      ASSERT_EQ(IncompleteUtf8Suffix(begun), n) << c;
      ASSERT_EQ(Utf8Prefix("a" + text, n), "a") << c;
    }
    ASSERT_EQ(IncompleteUtf8Suffix(text), 0u) << c;
  }
}

TEST(Utf8Test, WhatIsNoCodePointBecomesTheReplacementCharacter) {
  for (const uint32_t c : {0xD800u, 0xDFFFu, 0x110000u, 0xFFFFFFFFu}) {
    std::string text;
    AppendUtf8(c, text);
    EXPECT_EQ(text, "\xEF\xBF\xBD");
  }
}

// All 16,777,216 sequences of three bytes against the set of valid encodings.
TEST(Utf8Test, ValidityOfEveryThreeByteSequence) {
  std::vector<bool> is_pair(1 << 16);
  std::vector<bool> is_triple(1 << 24);
  for (uint32_t c = 0x80; c < 0x10000; ++c) {
    if (!IsScalar(c)) continue;
    const std::string text = Encode(c);
    size_t key = 0;
    for (const char byte : text) key = key * 256 + static_cast<unsigned char>(byte);
    (text.size() == 2 ? is_pair : is_triple)[key] = true;
  }
  std::string text(3, '\0');
  for (uint32_t key = 0; key < (1u << 24); ++key) {
    const uint32_t a = key >> 16;
    const uint32_t b = key >> 8 & 255;
    const uint32_t c = key & 255;
    text[0] = static_cast<char>(a);
    text[1] = static_cast<char>(b);
    text[2] = static_cast<char>(c);
    const bool expected = is_triple[key] || (a < 0x80 && b < 0x80 && c < 0x80) ||
                          (is_pair[key >> 8] && c < 0x80) || (a < 0x80 && is_pair[key & 0xFFFF]);
    if (IsValidUtf8(text) != expected) FAIL() << std::hex << key;
  }
}

// ASCII is looked at in stretches.
TEST(Utf8Test, ABadByteIsFoundAnywhereInALongText) {
  for (size_t n = 0; n < 40; ++n) {
    const std::string good(n, 'a');
    EXPECT_TRUE(IsValidUtf8(good));
    for (size_t at = 0; at <= n; ++at) {
      std::string text = good;
      text.insert(at, "\xC3\xA4");
      EXPECT_TRUE(IsValidUtf8(text)) << n << " " << at;
      text.erase(at, 1);
      EXPECT_FALSE(IsValidUtf8(text)) << n << " " << at;
    }
  }
}

TEST(Utf8Test, FourByteSequencesEndAtTheLastCodePoint) {
  EXPECT_TRUE(IsValidUtf8("\xF0\x90\x80\x80"));
  EXPECT_TRUE(IsValidUtf8("\xF4\x8F\xBF\xBF"));
  EXPECT_FALSE(IsValidUtf8("\xF0\x8F\xBF\xBF"));  // overlong
  EXPECT_FALSE(IsValidUtf8("\xF4\x90\x80\x80"));  // U+110000
  EXPECT_FALSE(IsValidUtf8("\xF5\x80\x80\x80"));
  EXPECT_FALSE(IsValidUtf8("\xF8\x88\x80\x80\x80"));
}

// The Unicode standard, table 3-8.
TEST(Utf8Test, MaximalSubpartsAreReplacedOnce) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(ReplaceInvalidUtf8("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"),
            "a" + r + r + r + "b" + r + "c" + r + r + "d");
  EXPECT_EQ(ReplaceInvalidUtf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(ReplaceInvalidUtf8("\xED\xA0\x80"), r + r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xF0\x9F\x98"), r);
  EXPECT_EQ(ReplaceInvalidUtf8(""), "");
}

TEST(Utf8Test, PrefixNeverSplitsACharacter) {
  const std::string text = "é€😀";
  EXPECT_EQ(Utf8Prefix(text, 0), "");
  EXPECT_EQ(Utf8Prefix(text, 1), "");
  EXPECT_EQ(Utf8Prefix(text, 2), "é");
  EXPECT_EQ(Utf8Prefix(text, 4), "é");
  EXPECT_EQ(Utf8Prefix(text, 5), "é€");
  EXPECT_EQ(Utf8Prefix(text, 8), "é€");
  EXPECT_EQ(Utf8Prefix(text, 9), text);
  EXPECT_EQ(Utf8Prefix(text, 100), text);
}

TEST(Utf8Test, PrefixOfBytesThatAreNoTextKeepsItsLength) {
  EXPECT_EQ(Utf8Prefix("\x80\x80\x80\x80\x80", 3).size(), 3u);
  EXPECT_EQ(Utf8Prefix("\xFF\xFF\xFF", 2).size(), 2u);
}

TEST(Utf8Test, InvalidBytesAreNotAnIncompleteSuffix) {
  EXPECT_EQ(IncompleteUtf8Suffix("a\xFF"), 0u);
  EXPECT_EQ(IncompleteUtf8Suffix("a\x80"), 0u);
  EXPECT_EQ(IncompleteUtf8Suffix("a\xE0\x80"), 0u);  // overlong whatever follows
  EXPECT_EQ(IncompleteUtf8Suffix("a\xED\xA0"), 0u);  // a surrogate whatever follows
  EXPECT_EQ(IncompleteUtf8Suffix("\xF0\x9F"), 2u);
  EXPECT_EQ(IncompleteUtf8Suffix("\xE2\x82\xAC\xE2"), 1u);
}

TEST(Utf8Test, DecodingInvalidBytesAdvancesOneByOne) {
  const std::string text = "\xE2\x82\x41";
  size_t pos = 0;
  EXPECT_EQ(NextCodePoint(text, &pos), 0xFFFDu);
  EXPECT_EQ(pos, 1u);
  EXPECT_EQ(NextCodePoint(text, &pos), 0xFFFDu);
  EXPECT_EQ(pos, 2u);
  EXPECT_EQ(NextCodePoint(text, &pos), static_cast<uint32_t>('A'));
}

}  // namespace
}  // namespace walsh
