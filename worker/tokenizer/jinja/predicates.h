// Jinja's tests: x is defined, x is string, n is divisibleby 2, …
//
// Errors:  INVALID_ARGUMENT    wrong arguments
//          UNIMPLEMENTED       a test outside the subset, by name
//          RESOURCE_EXHAUSTED  the budget
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/arguments.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

absl::StatusOr<bool> ApplyTest(const std::string& name, const Value& value,
                               const Arguments& arguments, Budget& budget);

}  // namespace walsh::jinja
