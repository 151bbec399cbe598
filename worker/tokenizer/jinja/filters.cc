#include "worker/tokenizer/jinja/filters.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/attributes.h"
#include "worker/tokenizer/jinja/json_text.h"
#include "worker/tokenizer/jinja/operators.h"
#include "worker/tokenizer/jinja/predicates.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

using Result = absl::StatusOr<Value>;

constexpr int64_t kIndentMax = 16;

absl::StatusOr<std::string> TextOf(const Value& value, Budget& budget) {
  WALSH_RETURN_IF_ERROR(AllowTextOf(value, budget));
  return ToText(value);
}

// a.b.c, where a part may be a number.
Result AttributePath(const Value& value, const std::string& path, Budget& budget) {
  Value at = value;
  WALSH_RETURN_IF_ERROR(budget.SpendCharacters(path.size()));
  for (const std::string_view part : SplitAt(path, ".", -1)) {
    const bool is_number = !part.empty() && std::all_of(part.begin(), part.end(), [](char c) {
      return c >= '0' && c <= '9';
    });
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(1));
    if (is_number) return absl::UnimplementedError("a number in an attribute's path");
    WALSH_ASSIGN_OR_RETURN(at, SubscriptOf(at, Value(std::string(part)), budget));
  }
  return at;
}

Result Trim(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("trim", {"chars"}));
  WALSH_ASSIGN_OR_RETURN(const auto characters, OptionalText("trim", values[0]));
  WALSH_ASSIGN_OR_RETURN(const std::string text, TextOf(value, budget));
  return Value(std::string(Strip(text, characters, Side::kBoth)));
}

Result Length(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("length", {}).status());
  if (value.is_undefined()) return Value(int64_t{0});
  if (const List* list = value.list()) return Value(static_cast<int64_t>(list->items.size()));
  if (const Map* map = value.map()) return Value(static_cast<int64_t>(map->items.size()));
  if (value.string() == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("'length' of ", std::string(value.TypeName())));
  }
  WALSH_RETURN_IF_ERROR(budget.SpendCharacters(value.string()->size()));
  return Value(static_cast<int64_t>(CountCodePoints(*value.string())));
}

Result Join(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("join", {"d", "attribute"}));
  WALSH_ASSIGN_OR_RETURN(const auto separator, OptionalText("join", values[0]));
  WALSH_ASSIGN_OR_RETURN(const auto attribute, OptionalText("join", values[1]));
  WALSH_ASSIGN_OR_RETURN(std::vector<Value> items, Iterate(value, budget));
  if (attribute) {
    for (Value& item : items) {
      WALSH_ASSIGN_OR_RETURN(item, AttributePath(item, *attribute, budget));
    }
  }
  return JoinTexts(items, separator.value_or(""), budget);
}

Result Default(const Value& value, const Arguments& arguments, Budget&) {
  WALSH_ASSIGN_OR_RETURN(const auto values,
                         arguments.Bind("default", {"default_value", "boolean"}));
  const bool is_replaced = value.is_undefined() || (values[1].IsTrue() && !value.IsTrue());
  if (!is_replaced) return value;
  return values[0].is_undefined() && arguments.positional.empty() && arguments.named.empty()
             ? Value("")
             : values[0];
}

Result First(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("first", {}).status());
  WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, Iterate(value, budget));
  return items.empty() ? Value::UndefinedBecause("an empty sequence has no first item")
                       : items.front();
}

Result Last(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("last", {}).status());
  WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, Iterate(value, budget));
  return items.empty() ? Value::UndefinedBecause("an empty sequence has no last item")
                       : items.back();
}

Result ToList(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("list", {}).status());
  WALSH_ASSIGN_OR_RETURN(std::vector<Value> items, Iterate(value, budget));
  return Value::MakeList(std::move(items));
}

Result Reverse(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("reverse", {}).status());
  WALSH_ASSIGN_OR_RETURN(std::vector<Value> items, Iterate(value, budget));
  std::reverse(items.begin(), items.end());
  return value.string() != nullptr ? JoinTexts(items, "", budget)
                                   : Value::MakeList(std::move(items));
}

Result ReplaceText(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("replace", {"old", "new", "count"}));
  WALSH_ASSIGN_OR_RETURN(const std::string from, TextArgument("replace", values[0]));
  WALSH_ASSIGN_OR_RETURN(const std::string to, TextArgument("replace", values[1]));
  WALSH_ASSIGN_OR_RETURN(const int64_t count_max, OptionalInteger("replace", values[2], -1));
  WALSH_ASSIGN_OR_RETURN(const std::string text, TextOf(value, budget));
  WALSH_RETURN_IF_ERROR(budget.SpendCharacters(text.size()));
  const size_t count = text.size() / std::max<size_t>(from.size(), 1) + 1;
  WALSH_RETURN_IF_ERROR(budget.AllowText(text.size() + count * to.size()));
  return Value(Replace(text, from, to, count_max));
}

Result Json(const Value& value, const Arguments& arguments, Budget& budget) {
  // As Hugging Face defines it, not as Jinja does.
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("tojson", {"ensure_ascii", "indent",
                                                                      "separators", "sort_keys"}));
  if (!values[2].is_undefined() && !values[2].is_none()) {
    return absl::UnimplementedError("argument 'separators' of 'tojson'");
  }
  if (values[3].IsTrue()) return absl::UnimplementedError("argument 'sort_keys' of 'tojson'");
  std::optional<int64_t> indent;
  if (!values[1].is_undefined() && !values[1].is_none()) {
    WALSH_ASSIGN_OR_RETURN(indent, IntegerArgument("tojson", values[1]));
    if (*indent < 0 || *indent > kIndentMax) {
      return absl::UnimplementedError(absl::StrCat("tojson with an indent of ", *indent));
    }
  }
  const int64_t growth = 1 + indent.value_or(0) * value.depth();
  WALSH_RETURN_IF_ERROR(AllowTextOf(value, budget));
  WALSH_RETURN_IF_ERROR(budget.AllowText(static_cast<size_t>(value.weight() * growth)));
  WALSH_ASSIGN_OR_RETURN(std::string text, ToJson(value, indent));
  if (!values[0].IsTrue()) return Value(std::move(text));
  // Two bytes of UTF-8 become six of ASCII.
  WALSH_RETURN_IF_ERROR(budget.AllowText(3 * text.size()));
  return Value(EscapeNonAscii(text));
}

Result TruncateReal(double real) {
  if (std::abs(real) < 9e18) return Value(static_cast<int64_t>(real));
  return absl::UnimplementedError("an integer beyond 64 bits");
}

// Python's int(text), or int(float(text)) where the text is no integer; nothing where both raise.
absl::StatusOr<std::optional<Value>> ParseInteger(std::string_view text) {
  text = Strip(text, std::nullopt, Side::kBoth);
  if (HasDigitBeyondAscii(text)) return absl::UnimplementedError("'int' of digits beyond ASCII");
  const auto is_digit = [&](size_t at) {
    return at < text.size() && text[at] >= '0' && text[at] <= '9';
  };
  std::string digits;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      digits.push_back(text[i]);
    } else if (i == 0 || !is_digit(i - 1) || !is_digit(i + 1)) {
      return std::optional<Value>();
    }
  }
  const bool has_sign = digits.starts_with('+') || digits.starts_with('-');
  const bool is_negative = digits.starts_with('-');
  if (has_sign) digits.erase(0, 1);
  // "inf" and "nan" have no integer.
  if (!digits.starts_with('.') && (digits.empty() || digits[0] < '0' || digits[0] > '9')) {
    return std::optional<Value>();
  }
  if (digits.find_first_not_of("0123456789") == std::string::npos) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(is_negative ? "-" + digits : digits, &number)) {
      return absl::UnimplementedError("an integer beyond 64 bits");
    }
    return std::optional<Value>(Value(number));
  }
  double real = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), real);
  if (end != digits.data() + digits.size() || error == std::errc::invalid_argument) {
    return std::optional<Value>();
  }
  if (error == std::errc::result_out_of_range) {
    // As good as infinite, or as zero.
    const bool is_tiny =
        digits.find("e-") != std::string::npos || digits.find("E-") != std::string::npos;
    return is_tiny ? std::optional<Value>(Value(int64_t{0})) : std::optional<Value>();
  }
  WALSH_ASSIGN_OR_RETURN(const Value number, TruncateReal(is_negative ? -real : real));
  return std::optional<Value>(number);
}

// int(value, default=0): the default where Python's int() raises.
Result ToInteger(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("int", {"default", "base"}));
  if (!values[1].is_undefined()) return absl::UnimplementedError("argument 'base' of 'int'");
  if (value.is_undefined()) {
    return absl::InvalidArgumentError(std::string(value.undefined_reason()));
  }
  int64_t number = 0;
  if (value.AsInteger(&number)) return Value(number);
  if (const double* real = value.real(); real != nullptr && !std::isnan(*real)) {
    return TruncateReal(*real);
  }
  if (const std::string* text = value.string()) {
    WALSH_RETURN_IF_ERROR(budget.SpendCharacters(text->size()));
    WALSH_ASSIGN_OR_RETURN(const std::optional<Value> parsed, ParseInteger(*text));
    if (parsed) return *parsed;
  }
  return values[0].is_undefined() ? Value(int64_t{0}) : values[0];
}

Result Absolute(const Value& value, const Arguments& arguments, Budget&) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("abs", {}).status());
  if (!value.is_number()) {
    return absl::InvalidArgumentError(absl::StrCat("'abs' of ", std::string(value.TypeName())));
  }
  if (value.AsReal() < 0) return Negate(value);
  int64_t number = 0;
  return value.AsInteger(&number) ? Value(number) : value;
}

Result Items(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind("items", {}).status());
  if (value.is_undefined()) return Value::MakeList({});
  if (value.map() == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("'items' of ", std::string(value.TypeName())));
  }
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(value.map()->items.size())));
  WALSH_RETURN_IF_ERROR(budget.SpendBytes(static_cast<size_t>(value.map()->key_bytes)));
  std::vector<Value> out;
  for (const auto& [key, item] : value.map()->items) {
    out.push_back(Value::MakeList({Value(key), item}, /*is_tuple=*/true));
  }
  return Value::MakeList(std::move(out));
}

// Arguments from the one at `first` on, for a filter or test that another filter calls.
Arguments Rest(const Arguments& arguments, size_t first) {
  Arguments rest;
  for (size_t i = first; i < arguments.positional.size(); ++i) {
    rest.positional.push_back(arguments.positional[i]);
  }
  rest.named = arguments.named;
  return rest;
}

// map(attribute='name'[, default=…]) or map('filter', …)
Result Map(const Value& value, const Arguments& arguments, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(std::vector<Value> items, Iterate(value, budget));
  if (arguments.positional.empty()) {
    WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind("map", {"attribute", "default"}));
    WALSH_ASSIGN_OR_RETURN(const std::string path, TextArgument("map", values[0]));
    for (Value& item : items) {
      WALSH_RETURN_IF_ERROR(budget.SpendSteps(1));
      WALSH_ASSIGN_OR_RETURN(item, AttributePath(item, path, budget));
      if (item.is_undefined() && !values[1].is_undefined()) item = values[1];
    }
    return Value::MakeList(std::move(items));
  }
  WALSH_ASSIGN_OR_RETURN(const std::string filter, TextArgument("map", arguments.positional[0]));
  // A chain map('map', 'map', …) would recurse once for each argument.
  if (filter == "map") return absl::UnimplementedError("'map' of 'map'");
  for (Value& item : items) {
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(1));
    WALSH_ASSIGN_OR_RETURN(item, ApplyFilter(filter, item, Rest(arguments, 1), budget));
  }
  return Value::MakeList(std::move(items));
}

// select(['test', …]), reject, selectattr('attribute'[, 'test', …]), rejectattr
Result Select(const std::string& name, const Value& value, const Arguments& arguments,
              Budget& budget) {
  const bool has_attribute = name.ends_with("attr");
  const bool wanted = name.starts_with("select");
  const size_t test_at = has_attribute ? 1 : 0;
  if (!arguments.named.empty()) {
    return absl::UnimplementedError(absl::StrCat("named arguments of '", name, "'"));
  }
  if (arguments.positional.size() < test_at) {
    return absl::InvalidArgumentError(absl::StrCat("'", name, "' without an attribute"));
  }
  std::string attribute;
  if (has_attribute) {
    WALSH_ASSIGN_OR_RETURN(attribute, TextArgument(name, arguments.positional[0]));
  }
  std::string test;
  if (arguments.positional.size() > test_at) {
    WALSH_ASSIGN_OR_RETURN(test, TextArgument(name, arguments.positional[test_at]));
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, Iterate(value, budget));
  std::vector<Value> kept;
  for (const Value& item : items) {
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(1));
    Value subject = item;
    if (has_attribute) {
      WALSH_ASSIGN_OR_RETURN(subject, AttributePath(item, attribute, budget));
    }
    bool holds = subject.IsTrue();
    if (!test.empty()) {
      WALSH_ASSIGN_OR_RETURN(holds, ApplyTest(test, subject, Rest(arguments, test_at + 1), budget));
    }
    if (holds == wanted) kept.push_back(item);
  }
  return Value::MakeList(std::move(kept));
}

Result ChangeCase(const std::string& name, const Value& value, const Arguments& arguments,
                  Budget& budget) {
  WALSH_RETURN_IF_ERROR(arguments.Bind(name, {}).status());
  WALSH_ASSIGN_OR_RETURN(const std::string text, TextOf(value, budget));
  WALSH_RETURN_IF_ERROR(budget.SpendCharacters(text.size()));
  if (name == "upper") return Value(Upper(text));
  if (name == "lower") return Value(Lower(text));
  if (name == "capitalize") return Value(Capitalize(text));
  return Value(text);  // string, safe
}

struct NamedFilter {
  std::string_view name;
  Result (*apply)(const Value&, const Arguments&, Budget&);
};
constexpr std::array<NamedFilter, 16> kFilters = {{{"trim", Trim},
                                                   {"length", Length},
                                                   {"count", Length},
                                                   {"join", Join},
                                                   {"default", Default},
                                                   {"d", Default},
                                                   {"first", First},
                                                   {"last", Last},
                                                   {"list", ToList},
                                                   {"reverse", Reverse},
                                                   {"replace", ReplaceText},
                                                   {"tojson", Json},
                                                   {"int", ToInteger},
                                                   {"abs", Absolute},
                                                   {"items", Items},
                                                   {"map", Map}}};

}  // namespace

absl::StatusOr<Value> ApplyFilter(const std::string& name, const Value& value,
                                  const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(SpendTexts(arguments, budget));
  const auto found = std::find_if(kFilters.begin(), kFilters.end(),
                                  [&](const NamedFilter& filter) { return filter.name == name; });
  if (found != kFilters.end()) return found->apply(value, arguments, budget);
  if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
    return Select(name, value, arguments, budget);
  }
  if (name == "upper" || name == "lower" || name == "capitalize" || name == "string" ||
      name == "safe") {
    return ChangeCase(name, value, arguments, budget);
  }
  return absl::UnimplementedError(absl::StrCat("filter '", name, "'"));
}

}  // namespace walsh::jinja
