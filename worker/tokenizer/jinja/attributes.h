// a.b and a['b'], with Jinja's order: an attribute first for the one, an item first for the other.
//
// Errors:  INVALID_ARGUMENT  anything of an undefined value
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

// Undefined where there is nothing by that name.
absl::StatusOr<Value> AttributeOf(const Value& object, const std::string& name, Budget& budget);
absl::StatusOr<Value> SubscriptOf(const Value& object, const Value& index, Budget& budget);

}  // namespace walsh::jinja
