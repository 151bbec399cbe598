#include "worker/evaluate/tasks/task_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::evaluate {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

class ReadTaskTest : public ::testing::Test {
 protected:
  absl::StatusOr<Task> Read(const std::string& name, const std::string& contents,
                            int64_t limit = 0) {
    EXPECT_OK(PublishFile(dir_ / name, contents));
    return ReadTask({.path = dir_ / name}, limit);
  }
  testing::TempDir dir_;
};

TEST_F(ReadTaskTest, QuestionsAreAskedAsTheHarnessAsksThem) {
  ASSERT_OK_AND_ASSIGN(
      const Task task,
      Read("piqa.jsonl",
           R"({"query": "Question: dresser\n", "choices": ["a pin", "zwölf"], "gold": 1})"
           "\n\n"
           R"({"query": "No question", "choices": ["x", "y", "z"], "gold": 0})"
           "\n"));
  EXPECT_EQ(task.name, "piqa");
  EXPECT_EQ(task.kind, TaskKind::kContinuations);
  ASSERT_EQ(task.items.size(), 2);
  EXPECT_EQ(task.items[0].gold, 1);
  ASSERT_EQ(task.items[0].choices.size(), 2);
  EXPECT_EQ(task.items[0].choices[0].context, "Question: dresser\nAnswer:");
  EXPECT_EQ(task.items[0].choices[1].context, "Question: dresser\nAnswer:");
  EXPECT_EQ(task.items[0].choices[1].continuation, " zwölf");
  EXPECT_EQ(task.items[0].choices[1].characters, 5) << "code points, without the space";
  EXPECT_EQ(task.items[1].choices[2].context, "No question");
}

TEST_F(ReadTaskTest, SchemasDifferInTheirContexts) {
  ASSERT_OK_AND_ASSIGN(
      const Task task,
      Read("winogrande.jsonl",
           R"({"context_options": ["so Sarah", "so Maria"], "continuation": "won.", "gold": 0})"));
  EXPECT_EQ(task.kind, TaskKind::kContexts);
  EXPECT_EQ(task.items[0].choices[1].context, "so Maria");
  EXPECT_EQ(task.items[0].choices[0].continuation, " won.");
  EXPECT_EQ(task.items[0].choices[1].continuation, " won.");
}

TEST_F(ReadTaskTest, LastWords) {
  ASSERT_OK_AND_ASSIGN(
      const Task task,
      Read("lambada.jsonl", R"({"context": "I don't care about", "continuation": "signs"})"));
  EXPECT_EQ(task.kind, TaskKind::kLastWord);
  ASSERT_EQ(task.items[0].choices.size(), 1);
  EXPECT_EQ(task.items[0].choices[0].continuation, " signs");
}

TEST_F(ReadTaskTest, HellaSwagInBothForms) {
  ASSERT_OK_AND_ASSIGN(const Task lines, Read("hellaswag.txt",
                                              "Roof: A man is [header] up. He\r\n2\r\n"
                                              "falls.\r\nsits.\r\nis [step] away.\r\nsings.\r\n"));
  ASSERT_EQ(lines.items.size(), 1);
  EXPECT_EQ(lines.kind, TaskKind::kContinuations);
  EXPECT_EQ(lines.items[0].gold, 2);
  EXPECT_EQ(lines.items[0].choices[2].context, "Roof: A man is up. He");
  EXPECT_EQ(lines.items[0].choices[2].continuation, " is away.");
  EXPECT_EQ(lines.items[0].choices[2].characters, 8);

  ASSERT_OK_AND_ASSIGN(
      const Task published,
      Read("hellaswag.jsonl",
           R"({"activity_label": "Roof", "ctx_a": "A man is up.", "ctx_b": "he",)"
           R"( "endings": ["falls.", "sits.", "is away.", "sings."], "label": "2"})"));
  EXPECT_EQ(published.items[0].choices[2].context, "Roof: A man is up. He");
  EXPECT_EQ(published.items[0].gold, 2);
}

TEST(CleanHellaSwagTest, AsTheHarnessDoes) {
  EXPECT_EQ(CleanHellaSwag("  How to [title] Begin. [step] Take  it. "), "How to. Begin. Take it.");
  EXPECT_EQ(CleanHellaSwag("a [b [c] d] e"), "a d] e");
  EXPECT_EQ(CleanHellaSwag("[x\ny] [z]"), "[x\ny] ");
  EXPECT_EQ(CleanHellaSwag("open [ end"), "open [ end");
  EXPECT_EQ(CleanHellaSwag("four    spaces"), "four  spaces");
}

// As in a Hugging Face cache, where a file is the link to a blob whose name may be any bytes.
TEST_F(ReadTaskTest, TheNameThatWasAskedForTellsFormatAndName) {
  const std::string blob = dir_ / "2f1c\xff";
  ASSERT_OK(PublishFile(blob, R"({"context": "a", "continuation": "b"})"));
  ASSERT_OK_AND_ASSIGN(const Task task,
                       ReadTask({.path = blob, .name = "snapshots/1/lambada.jsonl"}, 0));
  EXPECT_EQ(task.name, "lambada");
  EXPECT_EQ(task.kind, TaskKind::kLastWord);
}

TEST_F(ReadTaskTest, StopsAtTheLimit) {
  const std::string good = R"({"context": "a", "continuation": "b"})";
  ASSERT_OK_AND_ASSIGN(const Task task,
                       Read("t.jsonl", absl::StrCat(good, "\n", good, "\n", "broken"), 2));
  EXPECT_EQ(task.items.size(), 2);
}

TEST_F(ReadTaskTest, RefusesWhatIsNoTask) {
  EXPECT_THAT(ReadTask({.path = dir_ / "none.jsonl"}, 0), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Read("t.jsonl", ""), StatusIs(kInvalid, HasSubstr("task 't' has no item")));
  EXPECT_THAT(Read("t.txt", "\n\n"), StatusIs(kInvalid, HasSubstr("has no item")));
  EXPECT_THAT(Read("t.jsonl", "\xff"), StatusIs(kInvalid, HasSubstr("not UTF-8")));

  const struct {
    std::string line, message;
  } kLines[] = {
      {"{", "line 1"},
      {"[]", "line 1"},
      {"{}", "line 1: an item of a task has"},
      {R"({"query": 1})", "\"query\" must be a string"},
      {R"({"query": "q"})", "\"choices\" must be an array of strings"},
      {R"({"query": "q", "choices": "xy", "gold": 0})", "\"choices\" must be an array"},
      {R"({"query": "q", "choices": ["x", 1], "gold": 0})", "\"choices\" must be an array"},
      {R"({"query": "q", "choices": ["x"], "gold": 0})", "has 1 elements, must have from 2 to 32"},
      {R"({"query": "q", "choices": ["x", "y"], "gold": 2})", "index of one of 2 choices"},
      {R"({"query": "q", "choices": ["x", "y"], "gold": -1})", "index of one of 2 choices"},
      {R"({"query": "q", "choices": ["x", "y"], "gold": 0.5})", "index of one of 2 choices"},
      {R"({"query": "q", "choices": ["x", "y"], "gold": 99999999999999999999})", "line 1"},
      {R"({"query": "q", "choices": ["x", "y"]})", "index of one of 2 choices"},
      {R"({"query": " ", "choices": ["x", "y"], "gold": 0})", "a context is empty"},
      {R"({"query": "q", "choices": ["x", " "], "gold": 0})", "a continuation is empty"},
      {R"({"context": "c"})", "\"continuation\" must be a string"},
      {R"({"context_options": ["a", "b"], "gold": 0})", "\"continuation\" must be a string"},
      {R"({"activity_label": "a", "ctx_a": "b"})", "\"ctx_b\" must be a string"},
  };
  for (const auto& [line, message] : kLines) {
    EXPECT_THAT(Read("t.jsonl", line), StatusIs(kInvalid, HasSubstr(message))) << line;
  }
  EXPECT_THAT(Read("t.jsonl", R"({"context": "c", "continuation": "d"})"
                              "\n"
                              R"({"query": "q", "choices": ["x", "y"], "gold": 0})"),
              StatusIs(kInvalid, HasSubstr("line 2: has \"query\", the lines before \"context\"")));
  EXPECT_THAT(Read("t.txt", "context\nfour\na\nb\nc\nd\n"),
              StatusIs(kInvalid, HasSubstr("line 2: must be the number of the right ending")));
  EXPECT_THAT(Read("t.txt", "context\n4\na\nb\nc\nd\n"), HasCode(kInvalid));
  EXPECT_THAT(Read("t.txt", "context\n3\na\nb\nc"),
              StatusIs(kInvalid, HasSubstr("line 1: the item that begins here")));
}

TEST_F(ReadTaskTest, IsBounded) {
  const std::string huge(limits::kTaskItemBytesMax, 'x');
  EXPECT_THAT(Read("t.jsonl", absl::StrCat(R"({"context": "c", "continuation": ")", huge, R"("})")),
              StatusIs(kInvalid, HasSubstr("line 1")));
  EXPECT_THAT(Read("t.txt", absl::StrCat(huge, "x\n3\na\nb\nc\nd\n")),
              StatusIs(kInvalid, HasSubstr("at most 262144")));
  EXPECT_THAT(Read("t.jsonl", std::string(100, '[')), HasCode(kInvalid));
  std::string many;
  for (int i = 0; i <= limits::kTaskItemsMax; ++i) many += "c\n0\na\nb\nc\nd\n";
  EXPECT_THAT(Read("t.txt", many), StatusIs(kInvalid, HasSubstr("at most 100000 items")));
}

}  // namespace
}  // namespace walsh::evaluate
