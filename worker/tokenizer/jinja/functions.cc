#include "worker/tokenizer/jinja/functions.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/operators.h"

namespace walsh::jinja {
namespace {

using Result = absl::StatusOr<Value>;

constexpr std::array<std::string_view, 5> kFunctions = {"range", "namespace", "dict",
                                                        "raise_exception", "strftime_now"};
// The sandbox of Jinja has the same.
constexpr int64_t kRangeMax = 100'000;

Result Range(const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("range", {"start", "stop", "step"}));
  WALSH_ASSIGN_OR_RETURN(int64_t stop, IntegerArgument("range", values[0]));
  int64_t start = 0;
  if (!values[1].is_undefined()) {
    start = stop;
    WALSH_ASSIGN_OR_RETURN(stop, IntegerArgument("range", values[1]));
  }
  WALSH_ASSIGN_OR_RETURN(const int64_t step, OptionalInteger("range", values[2], 1));
  if (step == 0) return absl::InvalidArgumentError("'range' with step 0");
  std::vector<Value> items;
  for (int64_t at = start; step > 0 ? at < stop : at > stop;) {
    if (static_cast<int64_t>(items.size()) == kRangeMax) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a range of more than ", kRangeMax, " numbers"));
    }
    items.emplace_back(at);
    if (__builtin_add_overflow(at, step, &at)) break;
  }
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(items.size())));
  return Value::MakeList(std::move(items));
}

// Arguments by name, after those of a dictionary if there is one.
absl::StatusOr<std::vector<std::pair<std::string, Value>>> NamedValues(std::string_view name,
                                                                       const Arguments& arguments,
                                                                       Budget& budget) {
  std::vector<std::pair<std::string, Value>> items;
  if (arguments.positional.size() > 1 ||
      (arguments.positional.size() == 1 && arguments.positional[0].map() == nullptr)) {
    return absl::UnimplementedError(
        absl::StrCat("'", std::string(name), "' of anything but a dict and names"));
  }
  if (!arguments.positional.empty()) {
    const Map& map = *arguments.positional[0].map();
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(map.items.size())));
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(static_cast<size_t>(map.key_bytes)));
    items = map.items;
  }
  for (const auto& [key, value] : arguments.named) {
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(items.size() * (key.size() + 1)));
    const auto found = std::find_if(items.begin(), items.end(),
                                    [&key = key](const auto& item) { return item.first == key; });
    if (found == items.end()) {
      items.emplace_back(key, value);
    } else {
      found->second = value;
    }
  }
  return items;
}

Result RaiseException(const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("raise_exception", {"message"}));
  WALSH_RETURN_IF_ERROR(AllowTextOf(values[0], budget));
  return absl::InvalidArgumentError(ToText(values[0]));
}

Result StrftimeNow(const Arguments& arguments, absl::Time now, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("strftime_now", {"format"}));
  WALSH_ASSIGN_OR_RETURN(const std::string format, TextArgument("strftime_now", values[0]));
  constexpr std::string_view kConversions = "aAbBdHIjmMpSyY%";
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') continue;
    if (++i == format.size() || kConversions.find(format[i]) == std::string_view::npos) {
      return absl::UnimplementedError(absl::StrCat("strftime_now with '", format, "'"));
    }
  }
  // A conversion makes at most 9 characters ("September").
  WALSH_RETURN_IF_ERROR(budget.AllowText(9 * format.size()));
  return Value(absl::FormatTime(format, now, absl::UTCTimeZone()));
}

}  // namespace

bool IsFunction(std::string_view name) {
  return std::find(kFunctions.begin(), kFunctions.end(), name) != kFunctions.end();
}

absl::StatusOr<Value> CallFunction(std::string_view name, const Arguments& arguments,
                                   absl::Time now, Budget& budget) {
  WALSH_RETURN_IF_ERROR(SpendTexts(arguments, budget));
  if (name == "range") return Range(arguments, budget);
  if (name == "raise_exception") return RaiseException(arguments, budget);
  if (name == "strftime_now") return StrftimeNow(arguments, now, budget);
  WALSH_ASSIGN_OR_RETURN(auto items, NamedValues(name, arguments, budget));
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(items.size())));
  if (name == "dict") return Value::MakeMap(std::move(items));
  auto names = std::make_shared<Namespace>();
  names->attributes = std::move(items);
  return Value(std::move(names));
}

}  // namespace walsh::jinja
