// Jinja's filters: x | trim, messages | length, tools | tojson, …
//
// Filters that Jinja runs lazily (map, select, …) give a list at once.
//
// Errors:  INVALID_ARGUMENT    wrong arguments
//          UNIMPLEMENTED       a filter outside the subset, by name
//          RESOURCE_EXHAUSTED  the budget
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/arguments.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

absl::StatusOr<Value> ApplyFilter(const std::string& name, const Value& value,
                                  const Arguments& arguments, Budget& budget);

}  // namespace walsh::jinja
