#include "worker/tokenizer/jinja/expression_parser.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::jinja {
namespace {

using Kind = Expression::Kind;

// How many of .b, [c], (d), |e, if f may follow one value; each is a level of the tree.
constexpr int kPostfixMax = 64;

}  // namespace

ExpressionPtr ExpressionParser::Make(Kind kind) const {
  auto expression = std::make_unique<Expression>();
  expression->kind = kind;
  expression->line = tokens_.line();
  return expression;
}

ExpressionPtr ExpressionParser::Wrap(Kind kind, ExpressionPtr inner) const {
  ExpressionPtr expression = Make(kind);
  expression->operands.push_back(std::move(inner));
  return expression;
}

absl::StatusOr<ExpressionPtr> ExpressionParser::Parse(bool with_condition) {
  WALSH_RETURN_IF_ERROR(tokens_.Enter());
  Result expression = with_condition ? ParseConditional() : ParseOr();
  tokens_.Leave();
  return expression;
}

absl::StatusOr<ExpressionPtr> ExpressionParser::ParseTuple(bool with_condition) {
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr first, Parse(with_condition));
  if (!tokens_.IsOperator(",")) return first;
  ExpressionPtr tuple = Wrap(Kind::kTuple, std::move(first));
  while (tokens_.TakeOperator(",")) {
    if (tokens_.Is(Token::Kind::kBlockEnd) || tokens_.Is(Token::Kind::kOutputEnd) ||
        tokens_.IsOperator(")")) {
      break;
    }
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr item, Parse(with_condition));
    tuple->operands.push_back(std::move(item));
  }
  return tuple;
}

// x if c else y if d else z
ExpressionParser::Result ExpressionParser::ParseConditional() {
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr expression, ParseOr());
  for (int n = 0; tokens_.TakeName("if"); ++n) {
    if (n > kPostfixMax) return NotSupported(tokens_.line(), "so long a chain of conditions");
    ExpressionPtr conditional = Make(Kind::kConditional);
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr condition, ParseOr());
    ExpressionPtr otherwise;
    if (tokens_.TakeName("else")) {
      WALSH_ASSIGN_OR_RETURN(otherwise, Parse());
    }
    conditional->operands.push_back(std::move(condition));
    conditional->operands.push_back(std::move(expression));
    conditional->operands.push_back(std::move(otherwise));
    expression = std::move(conditional);
  }
  return expression;
}

ExpressionParser::Result ExpressionParser::ParseChain(Kind kind, std::string_view word,
                                                      ParseFunction operand) {
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr first, (this->*operand)());
  if (!tokens_.IsName(word)) return first;
  ExpressionPtr chain = Wrap(kind, std::move(first));
  while (tokens_.TakeName(word)) {
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr next, (this->*operand)());
    chain->operands.push_back(std::move(next));
  }
  return chain;
}

ExpressionParser::Result ExpressionParser::ParseOr() {
  return ParseChain(Kind::kOr, "or", &ExpressionParser::ParseAnd);
}

ExpressionParser::Result ExpressionParser::ParseAnd() {
  return ParseChain(Kind::kAnd, "and", &ExpressionParser::ParseNot);
}

ExpressionParser::Result ExpressionParser::ParseNot() {
  if (!tokens_.IsName("not")) return ParseCompare();
  ExpressionPtr negation = Make(Kind::kNot);
  tokens_.Take();
  WALSH_RETURN_IF_ERROR(tokens_.Enter());
  Result operand = ParseNot();
  tokens_.Leave();
  WALSH_RETURN_IF_ERROR(operand.status());
  negation->operands.push_back(*std::move(operand));
  return negation;
}

ExpressionParser::Result ExpressionParser::ParseCompare() {
  constexpr std::array<std::pair<std::string_view, CompareOperator>, 6> kOperators = {
      {{"==", CompareOperator::kEqual},
       {"!=", CompareOperator::kNotEqual},
       {"<", CompareOperator::kLess},
       {"<=", CompareOperator::kLessEqual},
       {">", CompareOperator::kGreater},
       {">=", CompareOperator::kGreaterEqual}}};
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr first, ParseSum());
  ExpressionPtr chain = Wrap(Kind::kCompare, std::move(first));
  while (true) {
    const auto known = std::find_if(kOperators.begin(), kOperators.end(), [this](const auto& op) {
      return tokens_.IsOperator(op.first);
    });
    if (known != kOperators.end()) {
      tokens_.Take();
      chain->compare.push_back(known->second);
    } else if (tokens_.TakeName("in")) {
      chain->compare.push_back(CompareOperator::kIn);
    } else if (tokens_.IsName("not") && tokens_.next().kind == Token::Kind::kName &&
               tokens_.next().text == "in") {
      tokens_.Take();
      tokens_.Take();
      chain->compare.push_back(CompareOperator::kNotIn);
    } else {
      break;
    }
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr next, ParseSum());
    chain->operands.push_back(std::move(next));
  }
  return chain->compare.empty() ? std::move(chain->operands.front()) : std::move(chain);
}

ExpressionParser::Result ExpressionParser::ParseBinary(
    std::initializer_list<std::pair<std::string_view, BinaryOperator>> operators,
    ParseFunction operand) {
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr first, (this->*operand)());
  ExpressionPtr chain = Wrap(Kind::kBinary, std::move(first));
  while (true) {
    const auto found = std::find_if(operators.begin(), operators.end(), [this](const auto& op) {
      return tokens_.IsOperator(op.first);
    });
    if (found == operators.end()) break;
    tokens_.Take();
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr next, (this->*operand)());
    chain->binary.push_back(found->second);
    chain->operands.push_back(std::move(next));
  }
  return chain->binary.empty() ? std::move(chain->operands.front()) : std::move(chain);
}

ExpressionParser::Result ExpressionParser::ParseSum() {
  return ParseBinary({{"+", BinaryOperator::kAdd}, {"-", BinaryOperator::kSubtract}},
                     &ExpressionParser::ParseConcatenation);
}

ExpressionParser::Result ExpressionParser::ParseConcatenation() {
  return ParseBinary({{"~", BinaryOperator::kConcatenate}}, &ExpressionParser::ParseProduct);
}

ExpressionParser::Result ExpressionParser::ParseProduct() {
  return ParseBinary({{"*", BinaryOperator::kMultiply},
                      {"/", BinaryOperator::kDivide},
                      {"//", BinaryOperator::kFloorDivide},
                      {"%", BinaryOperator::kModulo}},
                     &ExpressionParser::ParsePower);
}

ExpressionParser::Result ExpressionParser::ParsePower() {
  return ParseBinary({{"**", BinaryOperator::kPower}}, &ExpressionParser::ParseUnary);
}

ExpressionParser::Result ExpressionParser::ParseUnary() { return ParseSigned(true); }

ExpressionParser::Result ExpressionParser::ParseSigned(bool with_filter) {
  ExpressionPtr expression;
  if (tokens_.IsOperator("-") || tokens_.IsOperator("+")) {
    expression = Make(tokens_.IsOperator("-") ? Kind::kNegate : Kind::kPositive);
    tokens_.Take();
    WALSH_RETURN_IF_ERROR(tokens_.Enter());
    Result operand = ParseSigned(false);
    tokens_.Leave();
    WALSH_RETURN_IF_ERROR(operand.status());
    expression->operands.push_back(*std::move(operand));
  } else {
    WALSH_ASSIGN_OR_RETURN(expression, ParsePrimary());
  }
  WALSH_ASSIGN_OR_RETURN(expression, ParsePostfix(std::move(expression)));
  return with_filter ? ParseFilters(std::move(expression)) : std::move(expression);
}

ExpressionParser::Result ExpressionParser::ParsePrimary() {
  switch (tokens_.current().kind) {
    case Token::Kind::kName:
      return ParseNameOrConstant();
    case Token::Kind::kString:
      return ParseString();
    case Token::Kind::kInteger:
    case Token::Kind::kReal:
      return ParseNumber();
    default:
      break;
  }
  if (tokens_.IsOperator("(")) return ParseParenthesis();
  if (tokens_.IsOperator("[")) return ParseListLiteral();
  if (tokens_.IsOperator("{")) return ParseMapLiteral();
  return tokens_.Unexpected("an expression");
}

ExpressionParser::Result ExpressionParser::ParseNameOrConstant() {
  ExpressionPtr expression = Make(Kind::kConstant);
  const Token token = tokens_.Take();
  const std::string_view name = token.text;
  if (name == "true" || name == "True") {
    expression->constant = Value(true);
  } else if (name == "false" || name == "False") {
    expression->constant = Value(false);
  } else if (name == "none" || name == "None") {
    expression->constant = Value(None{});
  } else {
    expression->kind = Kind::kName;
    expression->name = token.text;
    uses_loop_ |= name == "loop";
  }
  return expression;
}

// "a" "b" is one string.
ExpressionParser::Result ExpressionParser::ParseString() {
  ExpressionPtr expression = Make(Kind::kConstant);
  std::string text;
  while (tokens_.Is(Token::Kind::kString)) text += tokens_.Take().text;
  expression->constant = Value(std::move(text));
  return expression;
}

ExpressionParser::Result ExpressionParser::ParseNumber() {
  ExpressionPtr expression = Make(Kind::kConstant);
  const Token token = tokens_.Take();
  const char* begin = token.text.data();
  const char* end = begin + token.text.size();
  std::errc error{};
  if (token.kind == Token::Kind::kInteger) {
    int64_t value = 0;
    error = std::from_chars(begin, end, value).ec;
    expression->constant = Value(value);
  } else {
    double value = 0;
    error = std::from_chars(begin, end, value).ec;
    expression->constant = Value(value);
  }
  if (error == std::errc()) return expression;
  return NotSupported(token.line, absl::StrCat("the number ", token.text));
}

ExpressionParser::Result ExpressionParser::ParseParenthesis() {
  ExpressionPtr empty = Make(Kind::kTuple);
  tokens_.Take();
  if (tokens_.TakeOperator(")")) return empty;
  WALSH_ASSIGN_OR_RETURN(ExpressionPtr expression, ParseTuple());
  WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator(")"));
  return expression;
}

ExpressionParser::Result ExpressionParser::ParseListLiteral() {
  ExpressionPtr list = Make(Kind::kList);
  tokens_.Take();
  while (!tokens_.IsOperator("]")) {
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr item, Parse());
    list->operands.push_back(std::move(item));
    if (!tokens_.TakeOperator(",")) break;
  }
  WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator("]"));
  return list;
}

ExpressionParser::Result ExpressionParser::ParseMapLiteral() {
  ExpressionPtr map = Make(Kind::kMap);
  tokens_.Take();
  while (!tokens_.IsOperator("}")) {
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr key, Parse());
    WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator(":"));
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr value, Parse());
    map->operands.push_back(std::move(key));
    map->operands.push_back(std::move(value));
    if (!tokens_.TakeOperator(",")) break;
  }
  WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator("}"));
  return map;
}

ExpressionParser::Result ExpressionParser::ParsePostfix(ExpressionPtr expression) {
  for (int n = 0;; ++n) {
    if (n > kPostfixMax) return NotSupported(tokens_.line(), "so long a chain of accesses");
    if (tokens_.IsOperator(".")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseAttribute(std::move(expression)));
    } else if (tokens_.IsOperator("[")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseSubscript(std::move(expression)));
    } else if (tokens_.IsOperator("(")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseCall(std::move(expression)));
    } else {
      return expression;
    }
  }
}

ExpressionParser::Result ExpressionParser::ParseFilters(ExpressionPtr expression) {
  for (int n = 0;; ++n) {
    if (n > kPostfixMax) return NotSupported(tokens_.line(), "so long a chain of filters");
    if (tokens_.IsOperator("|")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseFilter(std::move(expression)));
    } else if (tokens_.IsName("is")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseTest(std::move(expression)));
    } else if (tokens_.IsOperator("(")) {
      WALSH_ASSIGN_OR_RETURN(expression, ParseCall(std::move(expression)));
    } else {
      return expression;
    }
  }
}

ExpressionParser::Result ExpressionParser::ParseAttribute(ExpressionPtr expression) {
  ExpressionPtr attribute = Wrap(Kind::kAttribute, std::move(expression));
  tokens_.Take();
  if (tokens_.Is(Token::Kind::kInteger)) {
    attribute->kind = Kind::kItem;
    WALSH_ASSIGN_OR_RETURN(ExpressionPtr index, ParseNumber());
    attribute->operands.push_back(std::move(index));
    return attribute;
  }
  WALSH_ASSIGN_OR_RETURN(attribute->name, tokens_.ExpectName());
  return attribute;
}

// a[i], a[i:j], a[i:j:k]
ExpressionParser::Result ExpressionParser::ParseSubscript(ExpressionPtr expression) {
  ExpressionPtr subscript = Wrap(Kind::kItem, std::move(expression));
  tokens_.Take();
  ExpressionPtr parts[3];
  int n_colons = 0;
  while (!tokens_.IsOperator("]")) {
    if (tokens_.TakeOperator(":")) {
      if (++n_colons > 2) return tokens_.Unexpected("']'");
      continue;
    }
    if (tokens_.IsOperator(",") && (n_colons > 0 || parts[0] != nullptr)) {
      return NotSupported(tokens_.line(), "a tuple in the brackets after a value");
    }
    if (parts[n_colons] != nullptr) return tokens_.Unexpected("']'");
    WALSH_ASSIGN_OR_RETURN(parts[n_colons], Parse());
  }
  tokens_.Take();
  if (n_colons == 0) {
    if (parts[0] == nullptr) return SyntaxError(subscript->line, "empty brackets after a value");
    subscript->operands.push_back(std::move(parts[0]));
    return subscript;
  }
  subscript->kind = Kind::kSlice;
  for (ExpressionPtr& part : parts) subscript->operands.push_back(std::move(part));
  return subscript;
}

absl::Status ExpressionParser::ParseArguments(std::vector<Argument>& arguments) {
  WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator("("));
  while (!tokens_.IsOperator(")")) {
    if (tokens_.IsOperator("*") || tokens_.IsOperator("**")) {
      return NotSupported(tokens_.line(), "'*' before an argument");
    }
    Argument argument;
    if (tokens_.Is(Token::Kind::kName) && tokens_.next().kind == Token::Kind::kOperator &&
        tokens_.next().text == "=") {
      argument.name = tokens_.Take().text;
      tokens_.Take();
    } else if (!arguments.empty() && !arguments.back().name.empty()) {
      return SyntaxError(tokens_.line(), "a positional argument after a named one");
    }
    WALSH_ASSIGN_OR_RETURN(argument.value, Parse());
    arguments.push_back(std::move(argument));
    if (!tokens_.TakeOperator(",")) break;
  }
  return tokens_.ExpectOperator(")");
}

ExpressionParser::Result ExpressionParser::ParseCall(ExpressionPtr expression) {
  ExpressionPtr call = Wrap(Kind::kCall, std::move(expression));
  WALSH_RETURN_IF_ERROR(ParseArguments(call->arguments));
  return call;
}

ExpressionParser::Result ExpressionParser::ParseFilter(ExpressionPtr expression) {
  ExpressionPtr filter = Wrap(Kind::kFilter, std::move(expression));
  tokens_.Take();
  WALSH_ASSIGN_OR_RETURN(filter->name, tokens_.ExpectName());
  if (tokens_.IsOperator("(")) WALSH_RETURN_IF_ERROR(ParseArguments(filter->arguments));
  return filter;
}

// x is defined, x is not none, x is divisibleby 3, x is eq(3)
ExpressionParser::Result ExpressionParser::ParseTest(ExpressionPtr expression) {
  ExpressionPtr test = Wrap(Kind::kTest, std::move(expression));
  tokens_.Take();
  const bool is_negated = tokens_.TakeName("not");
  WALSH_ASSIGN_OR_RETURN(test->name, tokens_.ExpectName());
  const Token& token = tokens_.current();
  const bool begins_argument =
      token.kind == Token::Kind::kString || token.kind == Token::Kind::kInteger ||
      token.kind == Token::Kind::kReal || tokens_.IsOperator("[") || tokens_.IsOperator("{") ||
      (token.kind == Token::Kind::kName && token.text != "else" && token.text != "or" &&
       token.text != "and" && token.text != "is" && token.text != "if" && token.text != "not" &&
       token.text != "in");
  if (tokens_.IsOperator("(")) {
    WALSH_RETURN_IF_ERROR(ParseArguments(test->arguments));
  } else if (begins_argument) {
    Argument argument;
    WALSH_ASSIGN_OR_RETURN(argument.value, ParsePrimary());
    WALSH_ASSIGN_OR_RETURN(argument.value, ParsePostfix(std::move(argument.value)));
    test->arguments.push_back(std::move(argument));
  }
  if (!is_negated) return test;
  return Wrap(Kind::kNot, std::move(test));
}

}  // namespace walsh::jinja
