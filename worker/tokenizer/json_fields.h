// Fields of a JSON object with checked types; messages name the field.
//
// Errors:  INVALID_ARGUMENT  a field of another type, or a missing one that has no default
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

// Null when `object` has no such field.
const nlohmann::json* Find(const nlohmann::json& object, const char* field);
// A missing field and JSON null give `absent`; without it they are errors.
absl::StatusOr<std::string> StringField(const nlohmann::json& object, const char* field,
                                        std::optional<std::string_view> absent);
absl::StatusOr<bool> BoolField(const nlohmann::json& object, const char* field, bool absent);

}  // namespace walsh
