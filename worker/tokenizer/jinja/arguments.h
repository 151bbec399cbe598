// What a template passes to a function, filter, test or method.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // One value for each parameter, in order; undefined for those that were not passed.
  // INVALID_ARGUMENT when there are too many, UNIMPLEMENTED for an unknown name.
  absl::StatusOr<std::vector<Value>> Bind(std::string_view callee,
                                          std::initializer_list<std::string_view> parameters) const;
};

// For a callee that copies and reads the texts passed to it.
absl::Status SpendTexts(const Arguments& arguments, Budget& budget);

// Checked types of one argument. INVALID_ARGUMENT names the callee and the type.
absl::StatusOr<std::string> TextArgument(std::string_view callee, const Value& value);
absl::StatusOr<int64_t> IntegerArgument(std::string_view callee, const Value& value);
// Undefined and none are absent.
absl::StatusOr<std::optional<std::string>> OptionalText(std::string_view callee,
                                                        const Value& value);
absl::StatusOr<int64_t> OptionalInteger(std::string_view callee, const Value& value,
                                        int64_t absent);

}  // namespace walsh::jinja
