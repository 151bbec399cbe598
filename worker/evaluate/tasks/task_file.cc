#include "worker/evaluate/tasks/task_file.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/io/bounded_json.h"

namespace walsh::evaluate {
namespace {

using nlohmann::json;

constexpr JsonBounds kBounds{limits::kTaskItemBytesMax, limits::kJsonDepthMax};
constexpr int kHellaSwagEndings = 4;
constexpr std::string_view kSpace = " \t\r\n\v\f";

std::string_view StripRight(std::string_view text) {
  const size_t last = text.find_last_not_of(kSpace);
  return last == std::string_view::npos ? std::string_view() : text.substr(0, last + 1);
}

std::string_view Strip(std::string_view text) {
  const size_t first = text.find_first_not_of(kSpace);
  return first == std::string_view::npos ? std::string_view() : StripRight(text.substr(first));
}

int64_t CountCodePoints(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

absl::Status Malformed(std::string_view where, std::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(std::string(where), ": ", std::string(what)));
}

absl::StatusOr<std::string> Text(const json& item, const char* key, std::string_view where) {
  const auto found = item.find(key);
  if (found == item.end() || !found->is_string()) {
    return Malformed(where, absl::StrCat("\"", key, "\" must be a string"));
  }
  return found->get<std::string>();
}

absl::StatusOr<std::vector<std::string>> Texts(const json& item, const char* key,
                                               std::string_view where) {
  const auto found = item.find(key);
  const bool is_list = found != item.end() && found->is_array() &&
                       std::all_of(found->begin(), found->end(),
                                   [](const json& element) { return element.is_string(); });
  if (!is_list) return Malformed(where, absl::StrCat("\"", key, "\" must be an array of strings"));
  const auto n = static_cast<int64_t>(found->size());
  if (n < 2 || n > limits::kTaskChoicesMax) {
    return Malformed(where, absl::StrCat("\"", key, "\" has ", n, " elements, must have from 2 to ",
                                         limits::kTaskChoicesMax));
  }
  return found->get<std::vector<std::string>>();
}

absl::StatusOr<int64_t> Gold(const json& item, const char* key, size_t n_choices,
                             std::string_view where) {
  const auto found = item.find(key);
  int64_t gold = -1;
  if (found != item.end() && found->is_number_integer()) {
    gold = found->get<int64_t>();
  } else if (found != item.end() && found->is_string()) {  // as HellaSwag is published
    if (!absl::SimpleAtoi(found->get<std::string>(), &gold)) gold = -1;
  }
  if (gold < 0 || gold >= static_cast<int64_t>(n_choices)) {
    return Malformed(
        where, absl::StrCat("\"", key, "\" must be the index of one of ", n_choices, " choices"));
  }
  return gold;
}

absl::Status CheckContext(std::string_view context, std::string_view where) {
  return Strip(context).empty() ? Malformed(where, "a context is empty") : absl::OkStatus();
}

// With the space before it.
absl::StatusOr<std::string> Continuation(std::string_view choice, std::string_view where) {
  if (Strip(choice).empty()) return Malformed(where, "a continuation is empty");
  return absl::StrCat(" ", std::string(choice));
}

// Several continuations of one context.
absl::StatusOr<TaskItem> Continuations(std::string context, const std::vector<std::string>& choices,
                                       int64_t gold, std::string_view where) {
  WALSH_RETURN_IF_ERROR(CheckContext(context, where));
  TaskItem item;
  item.gold = gold;
  item.contexts.push_back(std::move(context));
  for (const std::string& choice : choices) {
    WALSH_ASSIGN_OR_RETURN(std::string continuation, Continuation(choice, where));
    item.continuations.push_back(std::move(continuation));
  }
  return item;
}

absl::StatusOr<TaskItem> Question(const json& line, std::string_view where) {
  constexpr std::string_view kAnswer = "\nAnswer:";
  WALSH_ASSIGN_OR_RETURN(std::string query, Text(line, "query", where));
  WALSH_ASSIGN_OR_RETURN(const auto choices, Texts(line, "choices", where));
  WALSH_ASSIGN_OR_RETURN(const int64_t gold, Gold(line, "gold", choices.size(), where));
  query = StripRight(query);
  if (query.starts_with("Question:") && !query.ends_with(kAnswer)) query += kAnswer;
  return Continuations(std::move(query), choices, gold, where);
}

absl::StatusOr<TaskItem> Schema(const json& line, std::string_view where) {
  TaskItem item;
  WALSH_ASSIGN_OR_RETURN(item.contexts, Texts(line, "context_options", where));
  WALSH_ASSIGN_OR_RETURN(const std::string text, Text(line, "continuation", where));
  WALSH_ASSIGN_OR_RETURN(item.gold, Gold(line, "gold", item.contexts.size(), where));
  for (const std::string& context : item.contexts) {
    WALSH_RETURN_IF_ERROR(CheckContext(context, where));
  }
  WALSH_ASSIGN_OR_RETURN(std::string continuation, Continuation(text, where));
  item.continuations.push_back(std::move(continuation));
  return item;
}

absl::StatusOr<TaskItem> LastWord(const json& line, std::string_view where) {
  WALSH_ASSIGN_OR_RETURN(std::string context, Text(line, "context", where));
  WALSH_ASSIGN_OR_RETURN(std::string continuation, Text(line, "continuation", where));
  return Continuations(std::move(context), {std::move(continuation)}, 0, where);
}

// As Python's str.capitalize(), where the first letter is ASCII.
std::string Capitalize(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  if (!text.empty() && text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 32);
  return text;
}

absl::StatusOr<TaskItem> HellaSwag(const std::string& context, std::vector<std::string> endings,
                                   int64_t gold, std::string_view where) {
  for (std::string& ending : endings) ending = CleanHellaSwag(ending);
  return Continuations(CleanHellaSwag(context), endings, gold, where);
}

absl::StatusOr<TaskItem> PublishedHellaSwag(const json& line, std::string_view where) {
  WALSH_ASSIGN_OR_RETURN(const std::string activity, Text(line, "activity_label", where));
  WALSH_ASSIGN_OR_RETURN(const std::string first, Text(line, "ctx_a", where));
  WALSH_ASSIGN_OR_RETURN(const std::string second, Text(line, "ctx_b", where));
  WALSH_ASSIGN_OR_RETURN(const auto endings, Texts(line, "endings", where));
  WALSH_ASSIGN_OR_RETURN(const int64_t gold, Gold(line, "label", endings.size(), where));
  return HellaSwag(absl::StrCat(activity, ": ", first, " ", Capitalize(second)), endings, gold,
                   where);
}

// A form of a line: the key that no other form has, and how an item is made from it.
struct Form {
  const char* key;
  TaskKind kind;
  absl::StatusOr<TaskItem> (*parse)(const json&, std::string_view where);
};
constexpr Form kForms[] = {{"query", TaskKind::kContinuations, Question},
                           {"context_options", TaskKind::kContexts, Schema},
                           {"context", TaskKind::kLastWord, LastWord},
                           {"activity_label", TaskKind::kContinuations, PublishedHellaSwag}};

class LineReader {
 public:
  explicit LineReader(std::string_view text) : text_(text) {}
  bool is_done() const { return text_.empty(); }
  absl::StatusOr<std::string_view> Next() {
    ++number_;
    const size_t end = std::min(text_.find('\n'), text_.size());
    std::string_view line = text_.substr(0, end);
    text_.remove_prefix(std::min(end + 1, text_.size()));
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (static_cast<int64_t>(line.size()) > limits::kTaskItemBytesMax) {
      return Malformed(where(), absl::StrCat("has ", line.size(), " bytes, at most ",
                                             limits::kTaskItemBytesMax, " are taken"));
    }
    return line;
  }
  std::string where() const { return absl::StrCat("line ", number_); }

 private:
  std::string_view text_;
  int64_t number_ = 0;
};

absl::Status AddItem(absl::StatusOr<TaskItem> item, Task& task, std::string_view where) {
  WALSH_RETURN_IF_ERROR(item.status());
  if (static_cast<int64_t>(task.items.size()) == limits::kTaskItemsMax) {
    return Malformed(where, absl::StrCat("a task has at most ", limits::kTaskItemsMax, " items"));
  }
  task.items.push_back(*std::move(item));
  return absl::OkStatus();
}

bool IsFull(const Task& task, int64_t limit) {
  return limit > 0 && static_cast<int64_t>(task.items.size()) == limit;
}

absl::Status ReadJsonLines(std::string_view text, int64_t limit, const KeepGoing& keep_going,
                           Task& task) {
  const Form* form = nullptr;
  for (LineReader lines(text); !lines.is_done() && !IsFull(task, limit);) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    WALSH_ASSIGN_OR_RETURN(const std::string_view line, lines.Next());
    if (Strip(line).empty()) continue;
    const std::string where = lines.where();
    WALSH_ASSIGN_OR_RETURN(const json element, ParseBoundedJson(where, line, kBounds));
    const auto* found = std::find_if(std::begin(kForms), std::end(kForms),
                                     [&](const Form& f) { return element.contains(f.key); });
    if (found == std::end(kForms)) {
      return Malformed(where,
                       "an item of a task has \"query\", \"context_options\", \"context\" or "
                       "\"activity_label\"");
    }
    if (form != nullptr && found != form) {
      return Malformed(where, absl::StrCat("has \"", found->key, "\", the lines before \"",
                                           form->key, "\": a task is of one form"));
    }
    form = found;
    task.kind = form->kind;
    WALSH_RETURN_IF_ERROR(AddItem(form->parse(element, where), task, where));
  }
  return absl::OkStatus();
}

absl::Status ReadSixLines(std::string_view text, int64_t limit, const KeepGoing& keep_going,
                          Task& task) {
  for (LineReader lines(text); !lines.is_done() && !IsFull(task, limit);) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    WALSH_ASSIGN_OR_RETURN(const std::string_view context, lines.Next());
    const std::string where = lines.where();
    if (Strip(context).empty()) continue;
    WALSH_ASSIGN_OR_RETURN(const std::string_view label, lines.Next());
    int gold = -1;
    if (!absl::SimpleAtoi(std::string(label), &gold) || gold < 0 || gold >= kHellaSwagEndings) {
      return Malformed(lines.where(), "must be the number of the right ending, from 0 to 3");
    }
    std::vector<std::string> endings;
    for (int i = 0; i < kHellaSwagEndings; ++i) {
      if (lines.is_done()) return Malformed(where, "the item that begins here has no four endings");
      WALSH_ASSIGN_OR_RETURN(const std::string_view ending, lines.Next());
      endings.emplace_back(ending);
    }
    WALSH_RETURN_IF_ERROR(
        AddItem(HellaSwag(std::string(context), std::move(endings), gold, where), task, where));
  }
  return absl::OkStatus();
}

}  // namespace

std::string CleanHellaSwag(std::string_view text) {
  const std::string titled = absl::StrReplaceAll(std::string(Strip(text)), {{" [title]", ". "}});
  std::string kept;
  size_t at = 0;
  while (at < titled.size()) {
    // An opening bracket up to the first closing one of the same line.
    const size_t open = titled.find('[', at);
    const size_t end = open == std::string::npos ? open : titled.find_first_of("]\n", open);
    if (end == std::string::npos) break;
    // What opens on a line without a closing one stays, all of it.
    kept.append(titled, at, (titled[end] == ']' ? open : end + 1) - at);
    at = end + 1;
  }
  kept.append(titled, at);
  return absl::StrReplaceAll(kept, {{"  ", " "}});
}

int64_t TaskItem::ForwardedBytes() const {
  int64_t n_bytes = 0;
  for (const std::string& context : contexts) n_bytes += static_cast<int64_t>(context.size());
  for (size_t k = 0; k < n_choices(); ++k) n_bytes += static_cast<int64_t>(continuation(k).size());
  return n_bytes;
}

int64_t TaskItem::Characters(size_t choice) const {
  return CountCodePoints(continuation(choice)) - 1;
}

absl::StatusOr<Task> ReadTask(const NamedFile& file, int64_t limit, const KeepGoing& keep_going) {
  WALSH_ASSIGN_OR_RETURN(const std::string text, ReadFile(file.path, limits::kTaskFileBytesMax));
  if (!IsValidUtf8(text)) return absl::InvalidArgumentError("the task's file is not UTF-8");
  Task task;
  task.file_bytes = static_cast<int64_t>(text.size());
  const std::filesystem::path name(file.shown());
  task.name = name.stem();
  if (name.extension() == ".jsonl") {
    WALSH_RETURN_IF_ERROR(ReadJsonLines(text, limit, keep_going, task));
  } else {
    WALSH_RETURN_IF_ERROR(ReadSixLines(text, limit, keep_going, task));
  }
  if (task.items.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file of task '", task.name, "' has no item"));
  }
  return task;
}

absl::StatusOr<std::vector<Task>> ReadTasks(std::span<const TaskSpec> specs,
                                            const KeepGoing& keep_going) {
  std::vector<Task> tasks;
  absl::Status stopped;  // about no file
  int64_t n_bytes = 0;
  for (const TaskSpec& spec : specs) {
    absl::StatusOr<Task> task =
        ReadTask({spec.path, spec.name}, spec.limit, [&] { return stopped = Ask(keep_going); });
    if (!stopped.ok()) return stopped;
    if (!task.ok()) {
      return absl::Status(task.status().code(),
                          absl::StrCat("task ", tasks.size() + 1, ": ", task.status().message()));
    }
    n_bytes += task->file_bytes;
    tasks.push_back(*std::move(task));
    if (n_bytes > limits::kTaskFileBytesMax) {
      return absl::InvalidArgumentError(
          absl::StrCat("the first ", tasks.size(), " tasks' files have ", n_bytes,
                       " bytes together, at most ", limits::kTaskFileBytesMax, " are taken"));
    }
  }
  return tasks;
}

double ApproximateTokens(const Task& task) {
  int64_t n_bytes = 0;
  for (const TaskItem& item : task.items) n_bytes += item.ForwardedBytes();
  return static_cast<double>(n_bytes) / 4;
}

}  // namespace walsh::evaluate
