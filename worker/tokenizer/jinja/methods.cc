#include "worker/tokenizer/jinja/methods.h"

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/operators.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

using Result = absl::StatusOr<Value>;

constexpr std::array<std::string_view, 47> kTextMethods = {
    "capitalize",   "casefold",    "center",    "count",      "encode",       "endswith",
    "expandtabs",   "find",        "format",    "format_map", "index",        "isalnum",
    "isalpha",      "isascii",     "isdecimal", "isdigit",    "isidentifier", "islower",
    "isnumeric",    "isprintable", "isspace",   "istitle",    "isupper",      "join",
    "ljust",        "lower",       "lstrip",    "maketrans",  "partition",    "removeprefix",
    "removesuffix", "replace",     "rfind",     "rindex",     "rjust",        "rpartition",
    "rsplit",       "rstrip",      "split",     "splitlines", "startswith",   "strip",
    "swapcase",     "title",       "translate", "upper",      "zfill"};
constexpr std::array<std::string_view, 11> kMapMethods = {
    "clear", "copy",    "fromkeys",   "get",    "items", "keys",
    "pop",   "popitem", "setdefault", "update", "values"};
constexpr std::array<std::string_view, 11> kListMethods = {"append", "clear",   "copy",   "count",
                                                           "extend", "index",   "insert", "pop",
                                                           "remove", "reverse", "sort"};

template <size_t kSize>
bool IsIn(const std::array<std::string_view, kSize>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Value TextList(const std::vector<std::string_view>& parts) {
  std::vector<Value> items;
  items.reserve(parts.size());
  for (const std::string_view part : parts) items.emplace_back(std::string(part));
  return Value::MakeList(std::move(items));
}

// Python's text positions are code points.
Value Position(std::string_view text, size_t byte) {
  if (byte == std::string_view::npos) return Value(int64_t{-1});
  return Value(static_cast<int64_t>(CountCodePoints(text.substr(0, byte))));
}

class TextMethods {
 public:
  TextMethods(const std::string& text, std::string_view name, const Arguments& arguments,
              Budget& budget)
      : text_(text), name_(name), arguments_(arguments), budget_(budget) {}

  Result Call() const {
    WALSH_RETURN_IF_ERROR(budget_.SpendCharacters(text_.size()));
    if (name_ == "strip") return StripSide(Side::kBoth);
    if (name_ == "lstrip") return StripSide(Side::kLeft);
    if (name_ == "rstrip") return StripSide(Side::kRight);
    if (name_ == "split" || name_ == "rsplit") return Split();
    if (name_ == "startswith" || name_ == "endswith") return HasAffix();
    if (name_ == "replace") return ReplaceAll();
    if (name_ == "join") return Join();
    if (name_ == "find" || name_ == "rfind" || name_ == "count") return Search();
    if (name_ == "removeprefix" || name_ == "removesuffix") return RemoveAffix();
    if (name_ == "isdigit" || name_ == "isspace") return IsAll();
    return WithoutArguments();
  }

 private:
  absl::StatusOr<Value> OnlyArgument(std::string_view parameter) const {
    WALSH_ASSIGN_OR_RETURN(const auto values, arguments_.Bind(name_, {parameter}));
    return values[0];
  }

  Result StripSide(Side side) const {
    WALSH_ASSIGN_OR_RETURN(const Value argument, OnlyArgument("chars"));
    WALSH_ASSIGN_OR_RETURN(const auto characters, OptionalText(name_, argument));
    return Value(std::string(Strip(text_, characters, side)));
  }

  Result Split() const {
    WALSH_ASSIGN_OR_RETURN(const auto values, arguments_.Bind(name_, {"sep", "maxsplit"}));
    WALSH_ASSIGN_OR_RETURN(const auto separator, OptionalText(name_, values[0]));
    WALSH_ASSIGN_OR_RETURN(const int64_t splits_max, OptionalInteger(name_, values[1], -1));
    const bool from_right = name_ == "rsplit" && splits_max >= 0;
    std::vector<std::string_view> parts;
    if (!separator) {
      if (from_right) return absl::UnimplementedError("'rsplit' at white space with a maximum");
      parts = SplitAtSpace(text_, splits_max);
    } else if (separator->empty()) {
      return absl::InvalidArgumentError("'split' with an empty separator");
    } else {
      parts = from_right ? SplitAtFromRight(text_, *separator, splits_max)
                         : SplitAt(text_, *separator, splits_max);
    }
    WALSH_RETURN_IF_ERROR(budget_.SpendSteps(static_cast<int64_t>(parts.size())));
    return TextList(parts);
  }

  // One affix or a tuple of them.
  Result HasAffix() const {
    WALSH_ASSIGN_OR_RETURN(const Value argument, OnlyArgument("affix"));
    const size_t n = argument.list() == nullptr ? 1 : argument.list()->items.size();
    for (size_t i = 0; i < n; ++i) {
      const Value& affix = argument.list() == nullptr ? argument : argument.list()->items[i];
      WALSH_RETURN_IF_ERROR(budget_.SpendSteps(1));
      WALSH_RETURN_IF_ERROR(budget_.SpendBytes(static_cast<size_t>(affix.weight())));
      WALSH_ASSIGN_OR_RETURN(const std::string text, TextArgument(name_, affix));
      if (name_ == "startswith" ? text_.starts_with(text) : text_.ends_with(text)) {
        return Value(true);
      }
    }
    return Value(false);
  }

  Result ReplaceAll() const {
    WALSH_ASSIGN_OR_RETURN(const auto values, arguments_.Bind(name_, {"old", "new", "count"}));
    WALSH_ASSIGN_OR_RETURN(const std::string from, TextArgument(name_, values[0]));
    WALSH_ASSIGN_OR_RETURN(const std::string to, TextArgument(name_, values[1]));
    WALSH_ASSIGN_OR_RETURN(const int64_t count_max, OptionalInteger(name_, values[2], -1));
    return ReplaceText(text_, from, to, count_max);
  }

  Result ReplaceText(std::string_view text, std::string_view from, std::string_view to,
                     int64_t count_max) const {
    // At most one replacement for each byte and one at the end.
    const size_t count = text.size() / std::max<size_t>(from.size(), 1) + 1;
    WALSH_RETURN_IF_ERROR(budget_.AllowText(text.size() + count * to.size()));
    return Value(Replace(text, from, to, count_max));
  }

  Result Join() const {
    WALSH_ASSIGN_OR_RETURN(const Value argument, OnlyArgument("iterable"));
    WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, Iterate(argument, budget_));
    for (const Value& item : items) {
      WALSH_RETURN_IF_ERROR(TextArgument(name_, item).status());
    }
    return JoinTexts(items, text_, budget_);
  }

  Result Search() const {
    WALSH_ASSIGN_OR_RETURN(const Value argument, OnlyArgument("sub"));
    WALSH_ASSIGN_OR_RETURN(const std::string part, TextArgument(name_, argument));
    if (name_ == "find") return Position(text_, FindText(text_, part));
    if (name_ == "rfind") return Position(text_, FindLastText(text_, part));
    const size_t count =
        part.empty() ? CountCodePoints(text_) + 1 : SplitAt(text_, part, -1).size() - 1;
    return Value(static_cast<int64_t>(count));
  }

  Result RemoveAffix() const {
    WALSH_ASSIGN_OR_RETURN(const Value argument, OnlyArgument("affix"));
    WALSH_ASSIGN_OR_RETURN(const std::string affix, TextArgument(name_, argument));
    std::string_view rest = text_;
    if (name_ == "removeprefix" && rest.starts_with(affix)) rest.remove_prefix(affix.size());
    if (name_ == "removesuffix" && rest.ends_with(affix)) rest.remove_suffix(affix.size());
    return Value(std::string(rest));
  }

  Result IsAll() const {
    WALSH_RETURN_IF_ERROR(arguments_.Bind(name_, {}).status());
    if (name_ == "isspace") {
      return Value(!text_.empty() && Strip(text_, std::nullopt, Side::kLeft).empty());
    }
    const bool is_ascii = std::all_of(text_.begin(), text_.end(), [](char c) { return c >= 0; });
    if (!is_ascii) return absl::UnimplementedError("'isdigit' beyond ASCII");
    return Value(!text_.empty() && std::all_of(text_.begin(), text_.end(),
                                               [](char c) { return c >= '0' && c <= '9'; }));
  }

  Result WithoutArguments() const {
    const bool is_known = name_ == "upper" || name_ == "lower" || name_ == "capitalize" ||
                          name_ == "title" || name_ == "splitlines";
    if (!is_known) return absl::UnimplementedError(absl::StrCat("method '", name_, "' of text"));
    WALSH_RETURN_IF_ERROR(arguments_.Bind(name_, {}).status());
    if (name_ == "splitlines") return TextList(SplitLines(text_));
    if (name_ == "upper") return Value(Upper(text_));
    if (name_ == "lower") return Value(Lower(text_));
    return Value(name_ == "title" ? Title(text_) : Capitalize(text_));
  }

  const std::string& text_;
  const std::string name_;
  const Arguments& arguments_;
  Budget& budget_;
};

Result CallMapMethod(const Map& map, std::string_view name, const Arguments& arguments,
                     Budget& budget) {
  if (name == "get") {
    WALSH_ASSIGN_OR_RETURN(const auto values, arguments.Bind(name, {"key", "default"}));
    WALSH_RETURN_IF_ERROR(SpendLookup(map, values[0], budget));
    const Value* found = values[0].string() == nullptr ? nullptr : map.Find(*values[0].string());
    if (found != nullptr) return *found;
    return values[1].is_undefined() ? Value(None{}) : values[1];
  }
  if (name != "items" && name != "keys" && name != "values") {
    return absl::UnimplementedError(absl::StrCat("method '", std::string(name), "' of dict"));
  }
  WALSH_RETURN_IF_ERROR(arguments.Bind(name, {}).status());
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(map.items.size())));
  WALSH_RETURN_IF_ERROR(budget.SpendBytes(static_cast<size_t>(map.key_bytes)));
  std::vector<Value> out;
  for (const auto& [key, value] : map.items) {
    if (name == "items") {
      out.push_back(Value::MakeList({Value(key), value}, /*is_tuple=*/true));
    } else {
      out.push_back(name == "keys" ? Value(key) : value);
    }
  }
  return Value::MakeList(std::move(out));
}

}  // namespace

bool HasMethod(const Value& self, std::string_view name) {
  if (self.string() != nullptr) return IsIn(kTextMethods, name);
  if (self.map() != nullptr) return IsIn(kMapMethods, name);
  return self.list() != nullptr && IsIn(kListMethods, name);
}

absl::StatusOr<Value> CallMethod(const Value& self, std::string_view name,
                                 const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(SpendTexts(arguments, budget));
  if (self.string() != nullptr) return TextMethods(*self.string(), name, arguments, budget).Call();
  if (self.map() != nullptr) return CallMapMethod(*self.map(), name, arguments, budget);
  return absl::UnimplementedError(
      absl::StrCat("method '", std::string(name), "' of ", std::string(self.TypeName())));
}

}  // namespace walsh::jinja
