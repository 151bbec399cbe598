// Runs a parsed template.
//
// The template sees its variables and the functions of functions.h, nothing else: no files, no
// modules, no Python. Work is counted in steps (budget.h): one for each node, and more for an
// operation by what it reads and makes, so that steps bound both time and memory.
//
// Errors:  INVALID_ARGUMENT    the template refuses (raise_exception), or misuses a value; with the
//                              line
//          UNIMPLEMENTED       a filter, test, function or method outside the subset, by name
//          RESOURCE_EXHAUSTED  steps, output or depth (common/limits.h)
// Threads: safe.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/tokenizer/jinja/ast.h"

namespace walsh::jinja {

struct Environment {
  std::vector<std::pair<std::string, Value>> variables;
  absl::Time now;  // for strftime_now
};

absl::StatusOr<std::string> RenderTemplate(const Block& block, const Environment& environment);

}  // namespace walsh::jinja
