#include "worker/tokenizer/jinja/operators.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

std::string TypeOf(const Value& value) { return std::string(value.TypeName()); }

std::string_view Symbol(BinaryOperator op) {
  switch (op) {
    case BinaryOperator::kAdd:
      return "+";
    case BinaryOperator::kSubtract:
      return "-";
    case BinaryOperator::kMultiply:
      return "*";
    case BinaryOperator::kDivide:
      return "/";
    case BinaryOperator::kFloorDivide:
      return "//";
    case BinaryOperator::kModulo:
      return "%";
    case BinaryOperator::kPower:
      return "**";
    case BinaryOperator::kConcatenate:
      return "~";
  }
  return "?";
}

absl::Status WrongOperands(std::string_view op, const Value& left, const Value& right) {
  return absl::InvalidArgumentError(
      absl::StrCat("'", std::string(op), "' between ", TypeOf(left), " and ", TypeOf(right)));
}

// For a message; a template must not fill memory with messages.
std::string ShortRepr(const Value& index) {
  constexpr size_t kBytesMax = 64;
  if (index.string() != nullptr && index.string()->size() > kBytesMax) return "of a long name";
  const bool is_plain = index.string() != nullptr || index.is_number() || index.is_none();
  return is_plain ? ToRepr(index) : absl::StrCat("at a ", TypeOf(index));
}

absl::Status TooLarge() { return absl::UnimplementedError("an integer beyond 64 bits"); }

// Rounded down, as Python does.
int64_t FloorDivide(int64_t a, int64_t b) {
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

absl::StatusOr<Value> IntegerPower(int64_t base, int64_t exponent) {
  if (exponent < 0)
    return Value(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  if (base == 0 || base == 1) return Value(exponent == 0 ? int64_t{1} : base);
  if (base == -1) return Value(exponent % 2 == 0 ? int64_t{1} : int64_t{-1});
  int64_t result = 1;
  for (int64_t i = 0; i < exponent; ++i) {  // at most 63 rounds until it overflows
    if (__builtin_mul_overflow(result, base, &result)) return TooLarge();
  }
  return Value(result);
}

absl::StatusOr<Value> ApplyToIntegers(BinaryOperator op, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (op) {
    case BinaryOperator::kAdd:
      if (__builtin_add_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case BinaryOperator::kSubtract:
      if (__builtin_sub_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case BinaryOperator::kMultiply:
      if (__builtin_mul_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case BinaryOperator::kPower:
      return IntegerPower(a, b);
    default:
      break;
  }
  if (b == 0) return absl::InvalidArgumentError("division by zero");
  if (op == BinaryOperator::kDivide) {
    return Value(static_cast<double>(a) / static_cast<double>(b));
  }
  if (b == -1) {  // the one quotient that may not fit
    if (op == BinaryOperator::kModulo) return Value(int64_t{0});
    return ApplyToIntegers(BinaryOperator::kSubtract, 0, a);
  }
  const int64_t quotient = FloorDivide(a, b);
  return Value(op == BinaryOperator::kModulo ? a - quotient * b : quotient);
}

absl::StatusOr<Value> ApplyToReals(BinaryOperator op, double a, double b) {
  switch (op) {
    case BinaryOperator::kAdd:
      return Value(a + b);
    case BinaryOperator::kSubtract:
      return Value(a - b);
    case BinaryOperator::kMultiply:
      return Value(a * b);
    case BinaryOperator::kPower:
      return Value(std::pow(a, b));
    default:
      break;
  }
  if (b == 0.0) return absl::InvalidArgumentError("division by zero");
  if (op == BinaryOperator::kDivide) return Value(a / b);
  const double quotient = std::floor(a / b);
  return Value(op == BinaryOperator::kModulo ? a - quotient * b : quotient);
}

absl::StatusOr<Value> Concatenate(const Value& left, const Value& right, Budget& budget) {
  WALSH_RETURN_IF_ERROR(AllowTextOf(left, budget));
  WALSH_RETURN_IF_ERROR(AllowTextOf(right, budget));
  return Value(ToText(left) + ToText(right));
}

// Text or a list, `count` times.
absl::StatusOr<Value> Repeat(const Value& value, int64_t count, Budget& budget) {
  const uint64_t n = count < 0 ? 0 : static_cast<uint64_t>(count);
  const uint64_t size =
      value.string() != nullptr ? value.string()->size() : value.list()->items.size();
  uint64_t total = 0;
  if (__builtin_mul_overflow(n, size, &total)) total = UINT64_MAX / 2;
  WALSH_RETURN_IF_ERROR(budget.AllowText(total));
  if (const std::string* text = value.string()) {
    std::string out;
    out.reserve(total);
    for (uint64_t i = 0; i < n && size > 0; ++i) out += *text;
    return Value(std::move(out));
  }
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(total)));
  std::vector<Value> items;
  for (uint64_t i = 0; i < n && size > 0; ++i) {
    items.insert(items.end(), value.list()->items.begin(), value.list()->items.end());
  }
  return Value::MakeList(std::move(items), value.list()->is_tuple);
}

// −1, 0 or 1.
absl::StatusOr<int> Order(std::string_view op, const Value& left, const Value& right) {
  if (left.is_number() && right.is_number()) {
    int64_t a = 0;
    int64_t b = 0;
    if (left.AsInteger(&a) && right.AsInteger(&b)) return a < b ? -1 : a > b ? 1 : 0;
    const double x = left.AsReal();
    const double y = right.AsReal();
    return x < y ? -1 : x > y ? 1 : 0;
  }
  // UTF-8 in the order of its bytes is in the order of its code points.
  if (left.string() != nullptr && right.string() != nullptr) {
    const int order = left.string()->compare(*right.string());
    return order < 0 ? -1 : order > 0 ? 1 : 0;
  }
  return WrongOperands(op, left, right);
}

absl::StatusOr<bool> Contains(const Value& container, const Value& item, Budget& budget) {
  if (container.is_undefined()) return false;
  if (const std::string* text = container.string()) {
    if (item.string() == nullptr) return WrongOperands("in", item, container);
    WALSH_RETURN_IF_ERROR(budget.SpendCharacters(text->size()));
    return FindText(*text, *item.string()) != std::string::npos;
  }
  if (const List* list = container.list()) {
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(list->items.size())));
    WALSH_RETURN_IF_ERROR(budget.SpendCharacters(static_cast<size_t>(container.weight())));
    return std::any_of(list->items.begin(), list->items.end(),
                       [&](const Value& other) { return Equal(item, other); });
  }
  if (const Map* map = container.map()) {
    WALSH_RETURN_IF_ERROR(SpendLookup(*map, item, budget));
    return item.string() != nullptr && map->Find(*item.string()) != nullptr;
  }
  return WrongOperands("in", item, container);
}

absl::Status CheckDefined(const Value& value) {
  if (!value.is_undefined()) return absl::OkStatus();
  return absl::InvalidArgumentError(std::string(value.undefined_reason()));
}

}  // namespace

absl::StatusOr<Value> Apply(BinaryOperator op, const Value& left, const Value& right,
                            Budget& budget) {
  if (op == BinaryOperator::kConcatenate) return Concatenate(left, right, budget);
  WALSH_RETURN_IF_ERROR(CheckDefined(left));
  WALSH_RETURN_IF_ERROR(CheckDefined(right));
  int64_t a = 0;
  int64_t b = 0;
  const bool left_is_integer = left.AsInteger(&a);
  const bool right_is_integer = right.AsInteger(&b);
  if (left_is_integer && right_is_integer) return ApplyToIntegers(op, a, b);
  if (left.is_number() && right.is_number()) {
    return ApplyToReals(op, left.AsReal(), right.AsReal());
  }
  const bool left_is_sequence = left.string() != nullptr || left.list() != nullptr;
  const bool right_is_sequence = right.string() != nullptr || right.list() != nullptr;
  if (op == BinaryOperator::kMultiply && left_is_sequence && right_is_integer) {
    return Repeat(left, b, budget);
  }
  if (op == BinaryOperator::kMultiply && right_is_sequence && left_is_integer) {
    return Repeat(right, a, budget);
  }
  if (op == BinaryOperator::kAdd && left.string() != nullptr && right.string() != nullptr) {
    return Concatenate(left, right, budget);
  }
  if (op == BinaryOperator::kAdd && left.list() != nullptr && right.list() != nullptr &&
      left.list()->is_tuple == right.list()->is_tuple) {
    const size_t n = left.list()->items.size() + right.list()->items.size();
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(n)));
    std::vector<Value> items;
    items.reserve(n);
    for (const Value* part : {&left, &right}) {
      items.insert(items.end(), part->list()->items.begin(), part->list()->items.end());
    }
    return Value::MakeList(std::move(items), left.list()->is_tuple);
  }
  if (op == BinaryOperator::kModulo && left.string() != nullptr) {
    return absl::UnimplementedError("'%' on text");
  }
  return WrongOperands(Symbol(op), left, right);
}

absl::StatusOr<bool> Compare(CompareOperator op, const Value& left, const Value& right,
                             Budget& budget) {
  const size_t compared = static_cast<size_t>(std::min(left.weight(), right.weight()));
  WALSH_RETURN_IF_ERROR(left.string() != nullptr ? budget.SpendBytes(compared)
                                                 : budget.SpendCharacters(compared));
  switch (op) {
    case CompareOperator::kEqual:
      return Equal(left, right);
    case CompareOperator::kNotEqual:
      return !Equal(left, right);
    case CompareOperator::kIn:
      return Contains(right, left, budget);
    case CompareOperator::kNotIn: {
      WALSH_ASSIGN_OR_RETURN(const bool contains, Contains(right, left, budget));
      return !contains;
    }
    default:
      break;
  }
  WALSH_RETURN_IF_ERROR(CheckDefined(left));
  WALSH_RETURN_IF_ERROR(CheckDefined(right));
  WALSH_ASSIGN_OR_RETURN(const int order, Order("<", left, right));
  switch (op) {
    case CompareOperator::kLess:
      return order < 0;
    case CompareOperator::kLessEqual:
      return order <= 0;
    case CompareOperator::kGreater:
      return order > 0;
    default:
      return order >= 0;
  }
}

absl::StatusOr<Value> Negate(const Value& value) {
  WALSH_RETURN_IF_ERROR(CheckDefined(value));
  int64_t number = 0;
  if (value.AsInteger(&number)) return ApplyToIntegers(BinaryOperator::kSubtract, 0, number);
  if (value.real() != nullptr) return Value(-*value.real());
  return absl::InvalidArgumentError(absl::StrCat("'-' before ", TypeOf(value)));
}

absl::StatusOr<Value> ItemOf(const Value& container, const Value& index, Budget& budget) {
  WALSH_RETURN_IF_ERROR(CheckDefined(container));
  if (const Map* map = container.map()) {
    WALSH_RETURN_IF_ERROR(SpendLookup(*map, index, budget));
    const Value* found = index.string() == nullptr ? nullptr : map->Find(*index.string());
    if (found != nullptr) return *found;
  }
  int64_t at = 0;
  const bool is_sequence = container.list() != nullptr || container.string() != nullptr;
  if (is_sequence && index.AsInteger(&at)) {
    const auto pick = [&at](const auto& items) -> std::optional<size_t> {
      const int64_t n = static_cast<int64_t>(items.size());
      const int64_t from_start = at < 0 ? at + n : at;
      if (from_start < 0 || from_start >= n) return std::nullopt;
      return static_cast<size_t>(from_start);
    };
    if (const List* list = container.list()) {
      if (const auto position = pick(list->items)) return list->items[*position];
    } else {
      WALSH_RETURN_IF_ERROR(budget.SpendCharacters(container.string()->size()));
      const std::vector<std::string_view> characters = CodePoints(*container.string());
      if (const auto position = pick(characters)) return Value(std::string(characters[*position]));
    }
  }
  return Value::UndefinedBecause(
      absl::StrCat("a ", TypeOf(container), " has no element ", ShortRepr(index)));
}

absl::StatusOr<Value> Slice(const Value& sequence, std::optional<int64_t> start,
                            std::optional<int64_t> stop, std::optional<int64_t> step,
                            Budget& budget) {
  WALSH_RETURN_IF_ERROR(CheckDefined(sequence));
  if (sequence.string() == nullptr && sequence.list() == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("a slice of ", TypeOf(sequence)));
  }
  const int64_t stride = step.value_or(1);
  if (stride == 0) return absl::InvalidArgumentError("a slice with step 0");
  if (const std::string* text = sequence.string()) {
    WALSH_RETURN_IF_ERROR(budget.SpendCharacters(text->size()));
  } else {
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(sequence.list()->items.size() * sizeof(Value)));
  }
  const std::vector<std::string_view> characters = sequence.string() != nullptr
                                                       ? CodePoints(*sequence.string())
                                                       : std::vector<std::string_view>();
  const int64_t n = static_cast<int64_t>(
      sequence.string() != nullptr ? characters.size() : sequence.list()->items.size());
  const auto clamp = [n, stride](int64_t at) {
    if (at < 0) at = std::max(at + n, int64_t{-1});
    if (stride > 0) return std::clamp(at, int64_t{0}, n);
    return std::min(at, n - 1);
  };
  const int64_t first = start ? clamp(*start) : stride > 0 ? 0 : n - 1;
  const int64_t last = stop ? clamp(*stop) : stride > 0 ? n : -1;
  std::string text;
  std::vector<Value> items;
  for (int64_t at = first; stride > 0 ? at < last : at > last;) {
    if (sequence.string() != nullptr) {
      text += characters[static_cast<size_t>(at)];
    } else {
      items.push_back(sequence.list()->items[static_cast<size_t>(at)]);
    }
    if (__builtin_add_overflow(at, stride, &at)) break;
  }
  if (sequence.string() != nullptr) return Value(std::move(text));
  return Value::MakeList(std::move(items), sequence.list()->is_tuple);
}

absl::Status SpendLookup(const Map& map, const Value& key, Budget& budget) {
  const size_t key_bytes = key.string() == nullptr ? 0 : key.string()->size();
  return budget.SpendBytes(map.items.size() * (key_bytes + 1));
}

absl::Status AllowTextOf(const Value& value, Budget& budget) {
  const size_t weight = static_cast<size_t>(value.weight());
  WALSH_RETURN_IF_ERROR(budget.AllowText(weight));
  // Lists, maps and numbers are written item by item.
  return value.string() != nullptr ? absl::OkStatus() : budget.SpendCharacters(4 * weight);
}

absl::StatusOr<std::vector<Value>> Iterate(const Value& value, Budget& budget) {
  std::vector<Value> items;
  if (value.is_undefined()) return items;
  if (const List* list = value.list()) {
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(list->items.size() * sizeof(Value)));
    items = list->items;
  } else if (const Map* map = value.map()) {
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(map->items.size())));
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(static_cast<size_t>(map->key_bytes)));
    for (const auto& item : map->items) items.emplace_back(item.first);
  } else if (const std::string* text = value.string()) {
    WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(text->size())));
    for (const std::string_view character : CodePoints(*text)) {
      items.emplace_back(std::string(character));
    }
  } else {
    return absl::InvalidArgumentError(absl::StrCat(TypeOf(value), " is not iterable"));
  }
  return items;
}

absl::StatusOr<Value> JoinTexts(const std::vector<Value>& items, std::string_view separator,
                                Budget& budget) {
  WALSH_RETURN_IF_ERROR(budget.SpendSteps(static_cast<int64_t>(items.size())));
  WALSH_RETURN_IF_ERROR(budget.AllowText(items.size() * separator.size()));
  for (const Value& item : items) WALSH_RETURN_IF_ERROR(AllowTextOf(item, budget));
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += separator;
    out += ToText(items[i]);
  }
  return Value(std::move(out));
}

}  // namespace walsh::jinja
