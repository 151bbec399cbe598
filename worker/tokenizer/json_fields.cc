#include "worker/tokenizer/json_fields.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace walsh {

using nlohmann::json;

const json* Find(const json& object, const char* field) {
  const auto found = object.find(field);
  return found == object.end() ? nullptr : &*found;
}

absl::StatusOr<std::string> StringField(const json& object, const char* field,
                                        std::optional<std::string_view> absent) {
  const json* value = Find(object, field);
  if (value != nullptr && value->is_string()) return value->get<std::string>();
  if ((value == nullptr || value->is_null()) && absent) return std::string(*absent);
  return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is no string"));
}

absl::StatusOr<bool> BoolField(const json& object, const char* field, bool absent) {
  const json* value = Find(object, field);
  if (value == nullptr || value->is_null()) return absent;
  if (value->is_boolean()) return value->get<bool>();
  return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is neither true nor false"));
}

}  // namespace walsh
