// Expressions: what stands inside {{ }} and after the keywords of statements.
//
// Errors as in parser.h.
#pragma once

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/ast.h"
#include "worker/tokenizer/jinja/token_stream.h"

namespace walsh::jinja {

class ExpressionParser {
 public:
  explicit ExpressionParser(TokenStream* tokens) : tokens_(*tokens) {}

  absl::StatusOr<ExpressionPtr> Parse(bool with_condition = true);
  // "a, b" makes a tuple.
  absl::StatusOr<ExpressionPtr> ParseTuple(bool with_condition = true);

  // Whether the name `loop` occurred since the last call.
  bool TakeUsesLoop() { return std::exchange(uses_loop_, false); }
  void SetUsesLoop() { uses_loop_ = true; }

 private:
  using Result = absl::StatusOr<ExpressionPtr>;
  using ParseFunction = Result (ExpressionParser::*)();

  Result ParseConditional();
  Result ParseOr();
  Result ParseAnd();
  Result ParseNot();
  Result ParseCompare();
  Result ParseSum();
  Result ParseConcatenation();
  Result ParseProduct();
  Result ParsePower();
  Result ParseUnary();
  Result ParseSigned(bool with_filter);
  Result ParsePrimary();
  Result ParseNameOrConstant();
  Result ParseString();
  Result ParseNumber();
  Result ParseParenthesis();
  Result ParseListLiteral();
  Result ParseMapLiteral();
  Result ParsePostfix(ExpressionPtr expression);
  Result ParseFilters(ExpressionPtr expression);
  Result ParseAttribute(ExpressionPtr expression);
  Result ParseSubscript(ExpressionPtr expression);
  Result ParseCall(ExpressionPtr expression);
  Result ParseFilter(ExpressionPtr expression);
  Result ParseTest(ExpressionPtr expression);
  absl::Status ParseArguments(std::vector<Argument>& arguments);

  Result ParseChain(Expression::Kind kind, std::string_view word, ParseFunction operand);
  Result ParseBinary(std::initializer_list<std::pair<std::string_view, BinaryOperator>> operators,
                     ParseFunction operand);

  ExpressionPtr Make(Expression::Kind kind) const;
  ExpressionPtr Wrap(Expression::Kind kind, ExpressionPtr inner) const;

  TokenStream& tokens_;
  bool uses_loop_ = false;
};

}  // namespace walsh::jinja
