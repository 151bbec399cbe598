// What an evaluation holds at one time, from shapes alone: told before its work, so that one that
// could never fit is refused instead of running out of memory after hours.
//
// An upper bound of what grows with the model and the request. What a process has beside it (served
// models, a job) is not in it.
#pragma once

#include <cstdint>
#include <span>

#include "worker/evaluate/tasks/task_file.h"
#include "worker/io/checkpoint.h"

namespace walsh::evaluate {

struct EvaluationShape {
  // Of a text: windows whose hidden states are held at once. 0 tokens: no text.
  int64_t window = 0;
  int64_t block_tokens = 0;
  // Of tasks. 0: none.
  int64_t item_tokens_max = 0;  // of all contexts and continuations of the largest item
  int64_t held_bytes = 0;       // texts, token ids
};

// What the tasks add to it.
void AddTasks(std::span<const Task> tasks, const ModelConfig& config, EvaluationShape& shape);

// `reference` is null where a text is not compared.
int64_t EvaluationBytes(const ModelConfig& config, const ModelConfig* reference,
                        const EvaluationShape& shape);

}  // namespace walsh::evaluate
