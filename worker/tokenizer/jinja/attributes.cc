#include "worker/tokenizer/jinja/attributes.h"

#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/methods.h"
#include "worker/tokenizer/jinja/operators.h"

namespace walsh::jinja {
namespace {

// Of a name in a message; a template must not fill memory with messages.
constexpr size_t kNameBytesMax = 64;

Value Method(const Value& self, const std::string& name) {
  return Value(std::make_shared<const Callable>(
      Callable{.name = name, .self = std::make_shared<const Value>(self)}));
}

}  // namespace

absl::StatusOr<Value> AttributeOf(const Value& object, const std::string& name, Budget& budget) {
  if (object.is_undefined()) {
    return absl::InvalidArgumentError(std::string(object.undefined_reason()));
  }
  if (const Namespace* names = object.names()) {
    WALSH_RETURN_IF_ERROR(budget.SpendBytes(names->attributes.size() * (name.size() + 1)));
    if (const Value* found = names->Find(name)) return *found;
  } else if (HasMethod(object, name)) {
    return Method(object, name);
  } else if (object.map() != nullptr) {
    WALSH_ASSIGN_OR_RETURN(Value item, ItemOf(object, Value(name), budget));
    if (!item.is_undefined()) return item;
  }
  return Value::UndefinedBecause(
      absl::StrCat("a ", std::string(object.TypeName()), " has no attribute '",
                   absl::string_view(name).substr(0, kNameBytesMax), "'"));
}

absl::StatusOr<Value> SubscriptOf(const Value& object, const Value& index, Budget& budget) {
  WALSH_ASSIGN_OR_RETURN(Value item, ItemOf(object, index, budget));
  if (item.is_undefined() && index.string() != nullptr && HasMethod(object, *index.string())) {
    return Method(object, *index.string());
  }
  return item;
}

}  // namespace walsh::jinja
