#include "worker/tokenizer/jinja/predicates.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/operators.h"

namespace walsh::jinja {
namespace {

bool IsSequence(const Value& value) {
  return value.string() != nullptr || value.list() != nullptr || value.map() != nullptr ||
         value.is_undefined();
}

// Tests that ask for a type or a truth, without arguments.
struct PlainTest {
  std::string_view name;
  bool (*holds)(const Value&);
};
constexpr std::array<PlainTest, 14> kPlainTests = {{
    {"defined", [](const Value& v) { return !v.is_undefined(); }},
    {"undefined", [](const Value& v) { return v.is_undefined(); }},
    {"none", [](const Value& v) { return v.is_none(); }},
    {"string", [](const Value& v) { return v.string() != nullptr; }},
    {"mapping", [](const Value& v) { return v.map() != nullptr; }},
    {"iterable", IsSequence},
    {"sequence", IsSequence},
    {"boolean", [](const Value& v) { return v.boolean() != nullptr; }},
    {"true", [](const Value& v) { return v.boolean() != nullptr && *v.boolean(); }},
    {"false", [](const Value& v) { return v.boolean() != nullptr && !*v.boolean(); }},
    {"number", [](const Value& v) { return v.is_number(); }},
    {"integer", [](const Value& v) { return v.integer() != nullptr; }},
    {"float", [](const Value& v) { return v.real() != nullptr; }},
    {"callable", [](const Value& v) { return v.callable() != nullptr; }},
}};

std::optional<CompareOperator> Comparison(std::string_view name) {
  struct Name {
    std::string_view name;
    CompareOperator op;
  };
  constexpr std::array<Name, 17> kNames = {{{"eq", CompareOperator::kEqual},
                                            {"equalto", CompareOperator::kEqual},
                                            {"==", CompareOperator::kEqual},
                                            {"ne", CompareOperator::kNotEqual},
                                            {"!=", CompareOperator::kNotEqual},
                                            {"lt", CompareOperator::kLess},
                                            {"lessthan", CompareOperator::kLess},
                                            {"<", CompareOperator::kLess},
                                            {"le", CompareOperator::kLessEqual},
                                            {"<=", CompareOperator::kLessEqual},
                                            {"gt", CompareOperator::kGreater},
                                            {"greaterthan", CompareOperator::kGreater},
                                            {">", CompareOperator::kGreater},
                                            {"ge", CompareOperator::kGreaterEqual},
                                            {">=", CompareOperator::kGreaterEqual},
                                            {"in", CompareOperator::kIn},
                                            {"sameas", CompareOperator::kEqual}}};
  const auto found = std::find_if(kNames.begin(), kNames.end(),
                                  [&](const Name& known) { return known.name == name; });
  if (found == kNames.end()) return std::nullopt;
  return found->op;
}

absl::StatusOr<Value> Remainder(const std::string& name, const Value& value, int64_t divisor,
                                Budget& budget) {
  WALSH_RETURN_IF_ERROR(IntegerArgument(name, value).status());
  return Apply(BinaryOperator::kModulo, value, Value(divisor), budget);
}

}  // namespace

absl::StatusOr<bool> ApplyTest(const std::string& name, const Value& value,
                               const Arguments& arguments, Budget& budget) {
  WALSH_RETURN_IF_ERROR(SpendTexts(arguments, budget));
  const auto plain = std::find_if(kPlainTests.begin(), kPlainTests.end(),
                                  [&](const PlainTest& test) { return test.name == name; });
  if (plain != kPlainTests.end()) {
    WALSH_RETURN_IF_ERROR(arguments.Bind(name, {}).status());
    return plain->holds(value);
  }
  if (const auto comparison = Comparison(name)) {
    WALSH_ASSIGN_OR_RETURN(const auto others, arguments.Bind(name, {"other"}));
    if (name == "sameas" && value.TypeName() != others[0].TypeName()) return false;
    return Compare(*comparison, value, others[0], budget);
  }
  if (name == "odd" || name == "even") {
    WALSH_ASSIGN_OR_RETURN(const Value remainder, Remainder(name, value, 2, budget));
    return remainder.IsTrue() == (name == "odd");
  }
  if (name == "divisibleby") {
    WALSH_ASSIGN_OR_RETURN(const auto others, arguments.Bind(name, {"num"}));
    WALSH_ASSIGN_OR_RETURN(const int64_t divisor, IntegerArgument(name, others[0]));
    WALSH_ASSIGN_OR_RETURN(const Value remainder, Remainder(name, value, divisor, budget));
    return !remainder.IsTrue();
  }
  return absl::UnimplementedError(absl::StrCat("test '", name, "'"));
}

}  // namespace walsh::jinja
