// Zero-shot tasks on disk, as contexts and continuations whose log-likelihoods decide.
//
//   .jsonl   one object a line, all of one form:
//     {"query": "…", "choices": ["…", …], "gold": 0}              PIQA, ARC
//     {"context_options": ["…", …], "continuation": "…", "gold": 0}   WinoGrande
//     {"context": "…", "continuation": "…"}                       LAMBADA
//     {"activity_label": "…", "ctx_a": "…", "ctx_b": "…", "endings": ["…", …], "label": 0}
//                                                                 HellaSwag as published
//   other    HellaSwag in six lines an item: context, label, four endings
//
// The ending, and the task's name, are those of the name that the file was asked for by.
//
// Prompts are those of lm-evaluation-harness
// (lm_eval/tasks/{piqa,arc,winogrande,lambada,hellaswag}, 2024): a query that begins with
// "Question:" is followed by "\nAnswer:", unless it ends so; a space stands before a continuation;
// HellaSwag's texts are cleaned of what WikiHow left in them; WinoGrande is evaluated partially, as
// the likelihood of what follows the two contexts that differ in the option (Trinh and Le 2018,
// arXiv 1806.02847).
//
// Files are hostile: size, number, depth and lengths are bounded, text must be UTF-8.
//
// Errors:  NOT_FOUND         no such file
//          INVALID_ARGUMENT  too large, not UTF-8, malformed (line), forms that differ, no item
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/io/named_file.h"

namespace walsh::evaluate {

// Choices, of which each is a context and what continues it. What all of them have in common is
// held once, so that a task takes about as much memory as its file. One choice alone: right if
// greedy decoding gives it.
struct TaskItem {
  std::vector<std::string> contexts;       // one of all choices, or one each
  std::vector<std::string> continuations;  // likewise, with the space before them
  int64_t gold = 0;                        // the index of the right one

  size_t n_choices() const { return std::max(contexts.size(), continuations.size()); }
  const std::string& context(size_t choice) const {
    return contexts[contexts.size() == 1 ? 0 : choice];
  }
  const std::string& continuation(size_t choice) const {
    return continuations[continuations.size() == 1 ? 0 : choice];
  }
  // Of contexts once, of continuations after each context: at least as many bytes as tokens go
  // through the model, but for a BOS.
  int64_t ForwardedBytes() const;
  // Code points of a continuation without the space before it: for accuracy_norm.
  int64_t Characters(size_t choice) const;
};

enum class TaskKind {
  kContinuations,  // one context, several continuations: accuracy and accuracy_norm
  kContexts,       // several contexts, one continuation: accuracy
  kLastWord,       // one of each: accuracy and perplexity
};

struct Task {
  std::string name;  // the file's, without folder and endings
  TaskKind kind = TaskKind::kContinuations;
  std::vector<TaskItem> items;
  int64_t file_bytes = 0;
};

// The first `limit` items, or all where it is 0; what follows them is not looked at. Asks
// `keep_going` before each item.
absl::StatusOr<Task> ReadTask(const NamedFile& file, int64_t limit,
                              const KeepGoing& keep_going = {});

struct TaskSpec {
  std::string path;   // resolved
  std::string name;   // as it was asked for; empty: the path
  int64_t limit = 0;  // items; 0: all
};

// All of an evaluation. Messages about one begin with its number, from "task 1".
// INVALID_ARGUMENT also for files that are too large together; what `keep_going` returns, as it is.
absl::StatusOr<std::vector<Task>> ReadTasks(std::span<const TaskSpec> specs,
                                            const KeepGoing& keep_going = {});

// Of all contexts and continuations: a token has about four characters.
double ApproximateTokens(const Task& task);

// HellaSwag's preprocessing: " [title]" becomes ". ", other text in brackets goes, double spaces
// become single ones, from left to right.
std::string CleanHellaSwag(std::string_view text);

}  // namespace walsh::evaluate
