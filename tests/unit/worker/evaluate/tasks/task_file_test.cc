#include "worker/evaluate/tasks/task_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
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
  ASSERT_EQ(task.items[0].n_choices(), 2);
  EXPECT_EQ(task.items[0].context(0), "Question: dresser\nAnswer:");
  EXPECT_EQ(task.items[0].context(1), "Question: dresser\nAnswer:");
  EXPECT_EQ(task.items[0].continuation(1), " zwölf");
  EXPECT_EQ(task.items[0].Characters(1), 5) << "code points, without the space";
  EXPECT_EQ(task.items[1].context(2), "No question");
  ASSERT_OK_AND_ASSIGN(
      const Task asked,
      Read("arc.jsonl", R"({"query": "Question: x\nAnswer: ", "choices": ["a", "b"], "gold": 0})"));
  EXPECT_EQ(asked.items[0].context(0), "Question: x\nAnswer:") << "asked once";
}

TEST_F(ReadTaskTest, SchemasDifferInTheirContexts) {
  ASSERT_OK_AND_ASSIGN(
      const Task task,
      Read("winogrande.jsonl",
           R"({"context_options": ["so Sarah", "so Maria"], "continuation": "won.", "gold": 0})"));
  EXPECT_EQ(task.kind, TaskKind::kContexts);
  EXPECT_EQ(task.items[0].context(1), "so Maria");
  EXPECT_EQ(task.items[0].continuation(0), " won.");
  EXPECT_EQ(task.items[0].continuation(1), " won.");
}

TEST_F(ReadTaskTest, LastWords) {
  ASSERT_OK_AND_ASSIGN(
      const Task task,
      Read("lambada.jsonl", R"({"context": "I don't care about", "continuation": "signs"})"));
  EXPECT_EQ(task.kind, TaskKind::kLastWord);
  ASSERT_EQ(task.items[0].n_choices(), 1);
  EXPECT_EQ(task.items[0].continuation(0), " signs");
}

TEST_F(ReadTaskTest, HellaSwagInBothForms) {
  ASSERT_OK_AND_ASSIGN(const Task lines, Read("hellaswag.txt",
                                              "Roof: A man is [header] up. He\r\n2\r\n"
                                              "falls.\r\nsits.\r\nis [step] away.\r\nsings.\r\n"));
  ASSERT_EQ(lines.items.size(), 1);
  EXPECT_EQ(lines.kind, TaskKind::kContinuations);
  EXPECT_EQ(lines.items[0].gold, 2);
  EXPECT_EQ(lines.items[0].context(2), "Roof: A man is up. He");
  EXPECT_EQ(lines.items[0].continuation(2), " is away.");
  EXPECT_EQ(lines.items[0].Characters(2), 8);

  ASSERT_OK_AND_ASSIGN(
      const Task published,
      Read("hellaswag.jsonl",
           R"({"activity_label": "Roof", "ctx_a": "A man is up.", "ctx_b": "he",)"
           R"( "endings": ["falls.", "sits.", "is away.", "sings."], "label": "2"})"));
  EXPECT_EQ(published.items[0].context(2), "Roof: A man is up. He");
  EXPECT_EQ(published.items[0].gold, 2);
}

TEST(CleanHellaSwagTest, AsTheHarnessDoes) {
  EXPECT_EQ(CleanHellaSwag("  How to [title] Begin. [step] Take  it. "), "How to. Begin. Take it.");
  EXPECT_EQ(CleanHellaSwag("a [b [c] d] e"), "a d] e");
  EXPECT_EQ(CleanHellaSwag("[x\ny] [z]"), "[x\ny] ");
  EXPECT_EQ(CleanHellaSwag("open [ end"), "open [ end");
  EXPECT_EQ(CleanHellaSwag("four    spaces"), "four  spaces");
  EXPECT_EQ(CleanHellaSwag("[a [b\n[c [d] e] [f"), "[a [b\n e] [f");
}

// Brackets that nothing closes on their line cost a look each: ten times as many take about ten
// times as long, not a hundred. Quadratic, these took minutes.
TEST(CleanHellaSwagTest, ManyOpenBrackets) {
  const std::string open = std::string(4 << 20, '[') + "\n]";
  const absl::Time start = absl::Now();
  EXPECT_EQ(CleanHellaSwag(open).size(), open.size());
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
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

// 32 choices of a context, and 32 contexts of a continuation, that fill their lines.
TEST_F(ReadTaskTest, WhatChoicesHaveInCommonIsHeldOnce) {
  const std::string large(limits::kTaskItemBytesMax - 1000, 'x');
  std::string choices;
  for (int i = 0; i < limits::kTaskChoicesMax; ++i) choices += i == 0 ? "\"a\"" : ", \"a\"";
  const auto held = [](const Task& task) {
    size_t n_bytes = 0;
    for (const std::string& text : task.items[0].contexts) n_bytes += text.size();
    for (const std::string& text : task.items[0].continuations) n_bytes += text.size();
    return n_bytes;
  };
  ASSERT_OK_AND_ASSIGN(const Task context,
                       Read("q.jsonl", absl::StrCat(R"({"query": ")", large, R"(", "choices": [)",
                                                    choices, R"(], "gold": 0})")));
  EXPECT_LT(held(context), large.size() + 100);
  EXPECT_EQ(context.items[0].context(31), large);
  ASSERT_OK_AND_ASSIGN(
      const Task continuation,
      Read("w.jsonl", absl::StrCat(R"({"continuation": ")", large, R"(", "context_options": [)",
                                   choices, R"(], "gold": 0})")));
  EXPECT_LT(held(continuation), large.size() + 100);
  EXPECT_EQ(continuation.items[0].continuation(31), " " + large);
}

TEST_F(ReadTaskTest, AsksBeforeEachItem) {
  for (const char* name : {"t.jsonl", "t.txt"}) {
    const bool is_json = std::string_view(name) == "t.jsonl";
    const std::string item = is_json ? R"({"context": "a", "continuation": "b"})"
                                       "\n"
                                     : "c\n0\na\nb\nc\nd\n";
    ASSERT_OK(PublishFile(dir_ / name, item + item + item));
    int n_asked = 0;
    EXPECT_THAT(
        ReadTask({.path = dir_ / name}, 0,
                 [&] { return ++n_asked == 2 ? absl::CancelledError("stop") : absl::OkStatus(); }),
        HasCode(absl::StatusCode::kCancelled));
    EXPECT_EQ(n_asked, 2);
  }
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
  for (const char* lines :
       {"c\n", "c\n3\n", "c\n3\na\nb\nc\n"}) {  // its label and its endings, too
    EXPECT_THAT(Read("t.txt", absl::StrCat(lines, huge, "x\na\nb\nc\n")),
                StatusIs(kInvalid, HasSubstr("has 262145 bytes, at most 262144")))
        << lines;
  }
  EXPECT_THAT(Read("t.jsonl", std::string(100, '[')), HasCode(kInvalid));
  std::string many;
  for (int i = 0; i <= limits::kTaskItemsMax; ++i) many += "c\n0\na\nb\nc\nd\n";
  EXPECT_THAT(Read("t.txt", many), StatusIs(kInvalid, HasSubstr("at most 100000 items")));
}

}  // namespace
}  // namespace walsh::evaluate
