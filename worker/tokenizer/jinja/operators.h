// Python's operators on values: arithmetic, order, membership, slices.
//
// Errors:  INVALID_ARGUMENT    operands of the wrong types, an undefined operand, division by zero
//          UNIMPLEMENTED       integers beyond 64 bits, "%" on text
//          RESOURCE_EXHAUSTED  the budget
// Messages have no line; the evaluator adds it.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/ast.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

absl::StatusOr<Value> Apply(BinaryOperator op, const Value& left, const Value& right,
                            Budget& budget);
absl::StatusOr<bool> Compare(CompareOperator op, const Value& left, const Value& right,
                             Budget& budget);
absl::StatusOr<Value> Negate(const Value& value);

// container[index]; undefined where there is nothing.
absl::StatusOr<Value> ItemOf(const Value& container, const Value& index, Budget& budget);
absl::StatusOr<Value> Slice(const Value& sequence, std::optional<int64_t> start,
                            std::optional<int64_t> stop, std::optional<int64_t> step,
                            Budget& budget);
// Before a key is looked up: a map is searched from its begin.
absl::Status SpendLookup(const Map& map, const Value& key, Budget& budget);
// Before the text of `value` is made.
absl::Status AllowTextOf(const Value& value, Budget& budget);
// What a for loop goes over: items, keys, code points; nothing for undefined.
absl::StatusOr<std::vector<Value>> Iterate(const Value& value, Budget& budget);
// str() of the items with `separator` between them.
absl::StatusOr<Value> JoinTexts(const std::vector<Value>& items, std::string_view separator,
                                Budget& budget);

}  // namespace walsh::jinja
