// Methods of text and dictionaries: message.content.strip(), tool.items(), …
//
// Methods that change what they are called on do not exist here, as in Jinja's immutable sandbox.
//
// Errors:  INVALID_ARGUMENT    wrong arguments
//          UNIMPLEMENTED       a method that Python has and walsh does not, by name
//          RESOURCE_EXHAUSTED  the budget
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/arguments.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

// Whether Python's type has such a method, known to walsh or not.
bool HasMethod(const Value& self, std::string_view name);
absl::StatusOr<Value> CallMethod(const Value& self, std::string_view name,
                                 const Arguments& arguments, Budget& budget);

}  // namespace walsh::jinja
