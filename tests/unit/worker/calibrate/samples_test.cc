#include "worker/calibrate/samples.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/calibrate/byte_tokenizer.h"

namespace walsh::calibrate {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::ByteTokenizer;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

constexpr std::string_view kTemplate =
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

class ReadSamplesTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& contents) {
    std::ofstream(directory_ / name, std::ios::binary) << contents;
    return directory_ / name;
  }
  absl::StatusOr<SampleSet> Read(const std::string& name, const std::string& contents,
                                 std::string_view chat_template = kTemplate) {
    return ReadSamples({.path = Write(name, contents)}, tokenizer_, chat_template);
  }

  testing::TempDir directory_;
  ByteTokenizer tokenizer_{true};
};

TEST_F(ReadSamplesTest, PlainTextIsOneSampleByteForByte) {
  ASSERT_OK_AND_ASSIGN(const SampleSet set, Read("a.raw", " = Title = \n\n text\r\n"));
  ASSERT_EQ(set.samples.size(), 1);
  EXPECT_EQ(set.samples[0].text, " = Title = \n\n text\r\n");
  EXPECT_FALSE(set.samples[0].is_chat);
  EXPECT_EQ(set.dropped, 0);
}

TEST_F(ReadSamplesTest, JsonLinesOfTextAndMessages) {
  ASSERT_OK_AND_ASSIGN(
      const SampleSet set,
      Read("a.jsonl",
           "{\"text\": \"one\"}\n\n{\"text\": \" \\n\"}\r\n"
           "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"id\": 7}"));
  ASSERT_EQ(set.samples.size(), 2);
  EXPECT_EQ(set.samples[0].text, "one");
  EXPECT_EQ(set.samples[1].text, "<s>[user]hi");
  EXPECT_TRUE(set.samples[1].is_chat);
  EXPECT_EQ(set.dropped, 1);
}

TEST_F(ReadSamplesTest, JsonArrayOfStringsAndObjects) {
  ASSERT_OK_AND_ASSIGN(const SampleSet set, Read("a.json", "[\"one\", {\"text\": \"two\"}, \"\"]"));
  ASSERT_EQ(set.samples.size(), 2);
  EXPECT_EQ(set.samples[1].text, "two");
  EXPECT_EQ(set.dropped, 1);
}

// As in a Hugging Face cache, where a file is the link to a blob.
TEST_F(ReadSamplesTest, TheNameThatWasAskedForTellsTheFormat) {
  const std::string lines = Write("2f1c", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
  ASSERT_OK_AND_ASSIGN(
      const SampleSet set,
      ReadSamples({.path = lines, .name = "snapshots/1/texts.jsonl"}, tokenizer_, ""));
  ASSERT_EQ(set.samples.size(), 2u);
  EXPECT_EQ(set.samples[1].text, "two");
  const std::string text = Write("blob.jsonl", "plain");
  ASSERT_OK_AND_ASSIGN(const SampleSet plain,
                       ReadSamples({.path = text, .name = "a.txt"}, tokenizer_, ""));
  EXPECT_EQ(plain.samples[0].text, "plain");
}

TEST_F(ReadSamplesTest, NothingToReadIsRefused) {
  EXPECT_THAT(ReadSamples({.path = directory_ / "none.txt"}, tokenizer_, ""),
              HasCode(absl::StatusCode::kNotFound));
  for (const char* name : {"a.txt", "a.jsonl"}) {
    EXPECT_THAT(Read(name, ""),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no sample with any text")));
    EXPECT_THAT(Read(name, "\n\n  \n"), HasCode(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_THAT(Read("a.json", "[]"), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(ReadSamplesTest, MalformedInputNamesThePlace) {
  EXPECT_THAT(Read("a.jsonl", "{\"text\": \"one\"}\n{\"text\": 5}\n"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 2")));
  EXPECT_THAT(Read("a.jsonl", "{\"text\": \"one\"}\n\n{\"text\""),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 3")));
  EXPECT_THAT(Read("a.jsonl", "[1]"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 1")));
  EXPECT_THAT(Read("a.jsonl", "{\"messages\": [{\"role\": \"user\"}]}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"content\"")));
  EXPECT_THAT(Read("a.json", "[\"one\", 2]"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("element 1")));
  EXPECT_THAT(Read("a.json", "{\"text\": \"one\"}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("array")));
  EXPECT_THAT(Read("a.json", "[], \"more\": []"), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(Read("a.json", "[\"one\""), HasCode(absl::StatusCode::kInvalidArgument));
  std::string deep;
  for (int i = 0; i < 100; ++i) deep += "[";
  EXPECT_THAT(Read("a.json", deep), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(ReadSamplesTest, InvalidUtf8NamesTheByte) {
  const std::string text = std::string(1000, 'a') + "\xc3\x28" + std::string(1000, 'b');
  EXPECT_THAT(Read("a.txt", text), StatusIs(absl::StatusCode::kInvalidArgument,
                                            AllOf(HasSubstr("UTF-8"), HasSubstr("byte 100"))));
  EXPECT_THAT(Read("a.txt", "cut short \xe2\x82"), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(ReadSamplesTest, MessagesNeedAChatTemplate) {
  const std::string chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}";
  EXPECT_THAT(Read("a.jsonl", chat, ""),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("chat template")));
  // A template that cannot be parsed matters only where one is needed.
  EXPECT_OK(Read("a.jsonl", "{\"text\": \"one\"}", "{% for %}"));
  EXPECT_THAT(Read("a.jsonl", chat, "{% for %}"), HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::calibrate
