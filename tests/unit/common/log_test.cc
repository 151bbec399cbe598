#include "common/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "common/utf8.h"
#include "tests/testing/status_matchers.h"

namespace walsh::log {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using ::walsh::testing::StatusIs;

TEST(LogTest, TextQuotesOnlyWhatNeedsIt) {
  EXPECT_EQ(Render(Format::kText, Level::kInfo, "job leased",
                   {{"job", "j1"}, {"worker", "a b"}, {"empty", ""}, {"token", 7}, {"ok", true}}),
            R"(info job leased job=j1 worker="a b" empty="" token=7 ok=true)");
}

TEST(LogTest, AValueCannotLookLikeAnotherField) {
  EXPECT_EQ(Render(Format::kText, Level::kError, "m", {{"name", "x\" admin=\"true"}}),
            R"(error m name="x\" admin=\"true")");
}

TEST(LogTest, JsonParsesBackToTheValues) {
  const std::string line =
      Render(Format::kJson, Level::kWarning, "m\"\\\n",
             {{"text", "a\"b\\c\r\n\x1b[31m"}, {"n", int64_t{-5}}, {"x", 1.5}, {"b", false}});
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["message"], "m\"\\\n");
  EXPECT_EQ(json["text"], "a\"b\\c\r\n\x1b[31m");
  EXPECT_EQ(json["n"], -5);
  EXPECT_EQ(json["x"], 1.5);
  EXPECT_EQ(json["b"], false);
}

TEST(LogTest, NonFiniteNumbersAreStringsInJson) {
  const auto json = nlohmann::json::parse(
      Render(Format::kJson, Level::kInfo, "m",
             {{"nan", std::nan("")}, {"inf", -std::numeric_limits<double>::infinity()}}));
  EXPECT_TRUE(json["nan"].is_string());
  EXPECT_EQ(json["inf"], "-inf");
}

// CR and LF forge lines, ESC drives terminals, bidirectional marks reorder what is read.
TEST(LogTest, NoControlOrBidirectionalCharacterLeaves) {
  std::vector<uint32_t> dangerous;
  for (uint32_t c = 0; c < 0x20; ++c) dangerous.push_back(c);
  for (uint32_t c = 0x7F; c < 0xA0; ++c) dangerous.push_back(c);
  for (uint32_t c = 0x2028; c <= 0x202E; ++c) dangerous.push_back(c);
  for (uint32_t c = 0x2066; c <= 0x2069; ++c) dangerous.push_back(c);
  dangerous.insert(dangerous.end(), {0x061C, 0x200E, 0x200F});
  for (const uint32_t c : dangerous) {
    std::string raw;
    AppendUtf8(c, raw);
    for (const Format format : {Format::kText, Format::kJson}) {
      const std::string line = Render(format, Level::kInfo, "m" + raw, {{"k", "x" + raw + "y"}});
      EXPECT_EQ(line.find(raw), std::string::npos) << c;
      EXPECT_THAT(line, HasSubstr("\\u"));
    }
  }
  EXPECT_EQ(Escape("a\nb\x1b"), "a\\u000ab\\u001b");
  EXPECT_EQ(Escape("\xE2\x80\xAE"), "\\u202e");
  EXPECT_EQ(Escape("é 😀"), "é 😀");
}

TEST(LogTest, InvalidUtf8IsReplaced) {
  EXPECT_EQ(Escape("a\xFF z"), "a\xEF\xBF\xBD z");
  EXPECT_NO_THROW(
      nlohmann::json::parse(Render(Format::kJson, Level::kInfo, "\xC0", {{"k", "\xF0\x9F"}})));
}

TEST(LogTest, LongValuesAreCutAtACharacter) {
  const std::string long_text(1 << 20, 'x');
  EXPECT_EQ(Escape(long_text).size(), 1024u);
  EXPECT_THAT(Escape(std::string(1024, 'x')), std::string(1024, 'x'));
  // Whatever the offset, no character and no escape is split.
  for (size_t offset = 0; offset < 12; ++offset) {
    for (const char* piece : {"\n", "é", "😀", "\"", "\\"}) {
      std::string text(offset, 'x');
      for (int i = 0; i < 2000; ++i) text += piece;
      const std::string escaped = Escape(text);
      EXPECT_LE(escaped.size(), 1024u);
      EXPECT_TRUE(IsValidUtf8(escaped));
      const auto json =
          nlohmann::json::parse(Render(Format::kJson, Level::kInfo, "m", {{"k", text}}));
      const std::string value = json["k"];
      ASSERT_GT(value.size(), 100u);
      const std::string kept = value.substr(0, value.size() - std::string("…").size());
      EXPECT_EQ(text.substr(0, kept.size()), kept);
    }
  }
}

TEST(LogTest, StatusFieldsShowTheCode) {
  EXPECT_THAT(
      Render(Format::kText, Level::kInfo, "m", {{"error", absl::NotFoundError("no model 'a'")}}),
      HasSubstr("NOT_FOUND: no model 'a'"));
}

TEST(LogTest, ParsesLevelsAndFormats) {
  Level level = Level::kInfo;
  EXPECT_OK(ParseLevel("error", &level));
  EXPECT_EQ(level, Level::kError);
  EXPECT_THAT(ParseLevel("loud\n", &level),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'loud\\u000a'")));
  Format format = Format::kText;
  EXPECT_OK(ParseFormat("json", &format));
  EXPECT_EQ(format, Format::kJson);
  EXPECT_THAT(ParseFormat("xml", &format),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'xml'")));
}

TEST(LogTest, WritesOneWholeLinePerEventFromManyThreads) {
  Configure("worker", Format::kJson, Level::kInfo);
  ::testing::internal::CaptureStderr();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int k = 0; k < 50; ++k) WALSH_LOG(Info, "event", {"k", k});
      WALSH_LOG(Debug, "hidden");
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string out = ::testing::internal::GetCapturedStderr();
  Configure("walsh", Format::kText, Level::kInfo);
  int n_lines = 0;
  for (size_t begin = 0; begin < out.size(); ++n_lines) {
    const size_t end = out.find('\n', begin);
    ASSERT_NE(end, std::string::npos);
    const auto json = nlohmann::json::parse(out.substr(begin, end - begin));
    EXPECT_EQ(json["component"], "worker");
    EXPECT_THAT(json["time"].get<std::string>(), StartsWith("2"));
    begin = end + 1;
  }
  EXPECT_EQ(n_lines, 200);
}

}  // namespace
}  // namespace walsh::log
