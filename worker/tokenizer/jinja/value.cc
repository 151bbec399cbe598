#include "worker/tokenizer/jinja/value.h"

#include <algorithm>
#include <limits>

#include "absl/container/flat_hash_map.h"
#include "worker/tokenizer/jinja/python_text.h"

namespace walsh::jinja {
namespace {

template <typename Items>
const Value* FindIn(const Items& items, std::string_view key) {
  const auto found =
      std::find_if(items.begin(), items.end(), [&](const auto& item) { return item.first == key; });
  return found == items.end() ? nullptr : &found->second;
}

int64_t AddWeights(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() / 4 : sum;
}

std::string JoinReprs(const std::vector<Value>& items) {
  std::string out;
  for (const Value& item : items) {
    if (!out.empty()) out += ", ";
    out += ToRepr(item);
  }
  return out;
}

}  // namespace

const Value* Map::Find(std::string_view key) const { return FindIn(items, key); }

const Value* Namespace::Find(std::string_view name) const { return FindIn(attributes, name); }

void Namespace::Set(std::string_view name, Value value) {
  const auto found = std::find_if(attributes.begin(), attributes.end(),
                                  [&](const auto& item) { return item.first == name; });
  if (found == attributes.end()) {
    attributes.emplace_back(name, std::move(value));
  } else {
    found->second = std::move(value);
  }
}

Value Value::MakeList(std::vector<Value> items, bool is_tuple) {
  int depth = 1;
  int64_t weight = 1;
  for (const Value& item : items) {
    depth = std::max(depth, item.depth() + 1);
    weight = AddWeights(weight, item.weight());
  }
  return Value(std::make_shared<const List>(
      List{.items = std::move(items), .is_tuple = is_tuple, .depth = depth, .weight = weight}));
}

Value Value::MakeMap(std::vector<std::pair<std::string, Value>> items) {
  int depth = 1;
  int64_t weight = 1;
  int64_t key_bytes = 0;
  for (const auto& [key, item] : items) {
    key_bytes += static_cast<int64_t>(key.size());
    depth = std::max(depth, item.depth() + 1);
    weight = AddWeights(weight, AddWeights(static_cast<int64_t>(key.size()), item.weight()));
  }
  return Value(std::make_shared<const Map>(
      Map{.items = std::move(items), .depth = depth, .weight = weight, .key_bytes = key_bytes}));
}

double Value::AsReal() const {
  if (const double* value = real()) return *value;
  int64_t value = 0;
  return AsInteger(&value) ? static_cast<double>(value) : 0.0;
}

bool Value::AsInteger(int64_t* out) const {
  if (const int64_t* value = integer()) {
    *out = *value;
    return true;
  }
  if (const bool* value = boolean()) {
    *out = *value ? 1 : 0;
    return true;
  }
  return false;
}

bool Value::IsTrue() const {
  if (is_undefined() || is_none()) return false;
  if (is_number()) return AsReal() != 0.0;
  if (const std::string* text = string()) return !text->empty();
  if (const List* items = list()) return !items->items.empty();
  if (const Map* items = map()) return !items->items.empty();
  return true;
}

int Value::depth() const {
  if (const List* items = list()) return items->depth;
  if (const Map* items = map()) return items->depth;
  return 0;
}

int64_t Value::weight() const {
  if (const std::string* text = string()) return static_cast<int64_t>(text->size()) + 1;
  if (const List* items = list()) return items->weight;
  if (const Map* items = map()) return items->weight;
  return 1;
}

std::string_view Value::TypeName() const {
  if (is_undefined()) return "Undefined";
  if (is_none()) return "NoneType";
  if (boolean() != nullptr) return "bool";
  if (integer() != nullptr) return "int";
  if (real() != nullptr) return "float";
  if (string() != nullptr) return "str";
  if (const List* items = list()) return items->is_tuple ? "tuple" : "list";
  if (map() != nullptr) return "dict";
  return names() != nullptr ? "namespace" : "function";
}

std::string_view Value::undefined_reason() const {
  const Undefined* undefined = std::get_if<Undefined>(&variant_);
  if (undefined == nullptr || undefined->reason == nullptr) return "a value is undefined";
  return *undefined->reason;
}

bool Equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    int64_t left = 0;
    int64_t right = 0;
    if (a.AsInteger(&left) && b.AsInteger(&right)) return left == right;
    return a.AsReal() == b.AsReal();
  }
  if (a.string() != nullptr && b.string() != nullptr) return *a.string() == *b.string();
  if (a.list() != nullptr && b.list() != nullptr) {
    const List& left = *a.list();
    const List& right = *b.list();
    return left.is_tuple == right.is_tuple &&
           std::equal(left.items.begin(), left.items.end(), right.items.begin(), right.items.end(),
                      Equal);
  }
  if (a.map() != nullptr && b.map() != nullptr) {
    const Map& left = *a.map();
    const Map& right = *b.map();
    if (left.items.size() != right.items.size()) return false;
    // Looking each key up in the list would take the square of their number.
    absl::flat_hash_map<std::string_view, const Value*> others;
    for (const auto& [key, value] : right.items) others.emplace(key, &value);
    return std::all_of(left.items.begin(), left.items.end(), [&](const auto& item) {
      const auto other = others.find(item.first);
      return other != others.end() && Equal(item.second, *other->second);
    });
  }
  if (a.names() != nullptr || b.names() != nullptr) return a.names() == b.names();
  if (a.callable() != nullptr || b.callable() != nullptr) return a.callable() == b.callable();
  return (a.is_none() && b.is_none()) || (a.is_undefined() && b.is_undefined());
}

std::string ToText(const Value& value) {
  if (const std::string* text = value.string()) return *text;
  if (value.is_undefined()) return "";
  return ToRepr(value);
}

std::string ToRepr(const Value& value) {
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "None";
  if (const bool* flag = value.boolean()) return *flag ? "True" : "False";
  if (const int64_t* number = value.integer()) return std::to_string(*number);
  if (const double* number = value.real()) return ReprOfReal(*number);
  if (const std::string* text = value.string()) return ReprOfString(*text);
  if (const List* list = value.list()) {
    const std::string items = JoinReprs(list->items);
    if (!list->is_tuple) return "[" + items + "]";
    return "(" + items + (list->items.size() == 1 ? ",)" : ")");
  }
  if (const Map* map = value.map()) {
    std::string out = "{";
    for (const auto& [key, item] : map->items) {
      if (out.size() > 1) out += ", ";
      out += ReprOfString(key) + ": " + ToRepr(item);
    }
    return out + "}";
  }
  // In steps: GCC 12 warns of "<" + … + ">" at -O3.
  std::string out(1, '<');
  out.append(value.TypeName());
  return out += '>';
}

}  // namespace walsh::jinja
