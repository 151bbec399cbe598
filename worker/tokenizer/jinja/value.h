// A value of a template: Python's, as far as chat templates need them.
//
// Lists and maps never change once they are made (as in Jinja's immutable sandbox), so values are
// shared, never cyclic, and cheap to copy. A namespace is the one thing that changes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace walsh::jinja {

struct MacroNode;
class Value;

// What a name or an attribute without a value gives. `reason` says what was missing, should the
// template go on to use it: "'tools' is undefined".
struct Undefined {
  std::shared_ptr<const std::string> reason;
};
struct None {};
struct List {
  std::vector<Value> items;
  bool is_tuple = false;  // only printing tells them apart
  int depth = 1;          // of lists and maps inside each other
  int64_t weight = 1;     // see Value::weight
};
struct Map {
  std::vector<std::pair<std::string, Value>> items;  // in the order of insertion
  int depth = 1;
  int64_t weight = 1;
  int64_t key_bytes = 0;  // of all keys

  const Value* Find(std::string_view key) const;
};
struct Namespace {
  std::vector<std::pair<std::string, Value>> attributes;

  const Value* Find(std::string_view name) const;
  void Set(std::string_view name, Value value);
};
// Something that can be called: a built-in function (no macro, self is Undefined), a method of
// `self`, or a macro.
struct Callable {
  std::string name;
  std::shared_ptr<const Value> self;
  const MacroNode* macro = nullptr;
};

class Value {
 public:
  using Variant =
      std::variant<Undefined, None, bool, int64_t, double, std::shared_ptr<const std::string>,
                   std::shared_ptr<const List>, std::shared_ptr<const Map>,
                   std::shared_ptr<Namespace>, std::shared_ptr<const Callable>>;

  Value() = default;  // undefined
  explicit Value(Undefined undefined) : variant_(std::move(undefined)) {}
  explicit Value(None none) : variant_(none) {}
  explicit Value(bool value) : variant_(value) {}
  explicit Value(int64_t value) : variant_(value) {}
  explicit Value(double value) : variant_(value) {}
  explicit Value(std::string text)
      : variant_(std::make_shared<const std::string>(std::move(text))) {}
  explicit Value(const char* text) : Value(std::string(text)) {}
  explicit Value(std::shared_ptr<const List> list) : variant_(std::move(list)) {}
  explicit Value(std::shared_ptr<const Map> map) : variant_(std::move(map)) {}
  explicit Value(std::shared_ptr<Namespace> names) : variant_(std::move(names)) {}
  explicit Value(std::shared_ptr<const Callable> callable) : variant_(std::move(callable)) {}

  static Value UndefinedBecause(std::string reason) {
    return Value(Undefined{std::make_shared<const std::string>(std::move(reason))});
  }
  static Value MakeList(std::vector<Value> items, bool is_tuple = false);
  static Value MakeMap(std::vector<std::pair<std::string, Value>> items);

  bool is_undefined() const { return std::holds_alternative<Undefined>(variant_); }
  bool is_none() const { return std::holds_alternative<None>(variant_); }
  // Null when the value is of another type.
  const bool* boolean() const { return std::get_if<bool>(&variant_); }
  const int64_t* integer() const { return std::get_if<int64_t>(&variant_); }
  const double* real() const { return std::get_if<double>(&variant_); }
  const std::string* string() const { return Pointee<std::shared_ptr<const std::string>>(); }
  const List* list() const { return Pointee<std::shared_ptr<const List>>(); }
  const Map* map() const { return Pointee<std::shared_ptr<const Map>>(); }
  Namespace* names() const { return Pointee<std::shared_ptr<Namespace>>(); }
  std::shared_ptr<Namespace> shared_names() const {
    const auto* held = std::get_if<std::shared_ptr<Namespace>>(&variant_);
    return held == nullptr ? nullptr : *held;
  }
  const Callable* callable() const { return Pointee<std::shared_ptr<const Callable>>(); }

  bool is_number() const { return boolean() || integer() || real(); }
  // 0 for what is no number; true is 1.
  double AsReal() const;
  // True, with the number, for integers and booleans.
  bool AsInteger(int64_t* out) const;
  bool IsTrue() const;
  int depth() const;
  // Bytes and items that walking the value meets. Shared parts count each time they are met, so it
  // can be exponential in the steps that made the value: it bounds what printing or comparing
  // costs.
  int64_t weight() const;
  // Python's name of the type, for messages: "str", "int", "NoneType", "dict object".
  std::string_view TypeName() const;
  // Why this value is undefined.
  std::string_view undefined_reason() const;

 private:
  template <typename Pointer>
  typename Pointer::element_type* Pointee() const {
    const Pointer* held = std::get_if<Pointer>(&variant_);
    return held == nullptr ? nullptr : held->get();
  }

  Variant variant_;
};

// Python's ==.
bool Equal(const Value& a, const Value& b);
// str(value): what {{ value }} prints.
std::string ToText(const Value& value);
// repr(value): how it looks inside a printed list.
std::string ToRepr(const Value& value);

}  // namespace walsh::jinja
