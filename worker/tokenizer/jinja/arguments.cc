#include "worker/tokenizer/jinja/arguments.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::jinja {
namespace {

absl::Status WrongType(std::string_view callee, std::string_view wanted, const Value& value) {
  return absl::InvalidArgumentError(absl::StrCat("'", std::string(callee), "' wants ",
                                                 std::string(wanted), ", not ",
                                                 std::string(value.TypeName())));
}

}  // namespace

absl::StatusOr<std::vector<Value>> Arguments::Bind(
    std::string_view callee, std::initializer_list<std::string_view> parameters) const {
  if (positional.size() > parameters.size()) {
    return absl::InvalidArgumentError(absl::StrCat("'", std::string(callee), "' takes at most ",
                                                   parameters.size(), " arguments, not ",
                                                   positional.size()));
  }
  std::vector<Value> values = positional;
  values.resize(parameters.size());
  for (const auto& [name, value] : named) {
    const auto found = std::find(parameters.begin(), parameters.end(), name);
    if (found == parameters.end()) {
      return absl::UnimplementedError(
          absl::StrCat("argument '", name, "' of '", std::string(callee), "'"));
    }
    const size_t index = static_cast<size_t>(found - parameters.begin());
    if (index < positional.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", std::string(callee), "' got '", name, "' twice"));
    }
    values[index] = value;
  }
  return values;
}

absl::Status SpendTexts(const Arguments& arguments, Budget& budget) {
  const auto spend = [&budget](const Value& value) {
    return value.string() == nullptr ? absl::OkStatus()
                                     : budget.SpendCharacters(value.string()->size());
  };
  for (const Value& value : arguments.positional) WALSH_RETURN_IF_ERROR(spend(value));
  for (const auto& [name, value] : arguments.named) WALSH_RETURN_IF_ERROR(spend(value));
  return absl::OkStatus();
}

absl::StatusOr<std::string> TextArgument(std::string_view callee, const Value& value) {
  if (value.string() == nullptr) return WrongType(callee, "text", value);
  return *value.string();
}

absl::StatusOr<int64_t> IntegerArgument(std::string_view callee, const Value& value) {
  int64_t number = 0;
  if (!value.AsInteger(&number)) return WrongType(callee, "an integer", value);
  return number;
}

absl::StatusOr<std::optional<std::string>> OptionalText(std::string_view callee,
                                                        const Value& value) {
  if (value.is_undefined() || value.is_none()) return std::optional<std::string>();
  WALSH_ASSIGN_OR_RETURN(std::string text, TextArgument(callee, value));
  return std::optional<std::string>(std::move(text));
}

absl::StatusOr<int64_t> OptionalInteger(std::string_view callee, const Value& value,
                                        int64_t absent) {
  if (value.is_undefined() || value.is_none()) return absent;
  return IntegerArgument(callee, value);
}

}  // namespace walsh::jinja
