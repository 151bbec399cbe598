// Functions that a template can call: range, namespace, dict, raise_exception, strftime_now.
//
// Errors:  INVALID_ARGUMENT    wrong arguments; raise_exception, with its text
//          UNIMPLEMENTED       a conversion of strftime_now outside the subset, by name
//          RESOURCE_EXHAUSTED  the budget
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/tokenizer/jinja/arguments.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

bool IsFunction(std::string_view name);
absl::StatusOr<Value> CallFunction(std::string_view name, const Arguments& arguments,
                                   absl::Time now, Budget& budget);

}  // namespace walsh::jinja
