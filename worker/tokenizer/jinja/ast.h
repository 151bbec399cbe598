// The tree of a parsed template.
//
// Chains of one precedence (a + b - c, a.b.c, x or y or z) are flat, so that the tree is no deeper
// than the brackets and blocks of its source, and both are limited by limits::kTemplateDepthMax.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Argument {
  std::string name;  // empty: positional
  ExpressionPtr value;
};

enum class BinaryOperator {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kFloorDivide,
  kModulo,
  kPower,
  kConcatenate,
};
enum class CompareOperator {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual,
  kIn,
  kNotIn
};

struct Expression {
  enum class Kind {
    kConstant,     // constant
    kName,         // name
    kList,         // operands
    kTuple,        // operands
    kMap,          // operands: key, value, key, value, …
    kBinary,       // operands[0] binary[0] operands[1] binary[1] …, from the left
    kCompare,      // operands[0] compare[0] operands[1] …, each pair must hold
    kAnd,          // operands
    kOr,           // operands
    kNot,          // operands[0]
    kNegate,       // operands[0]
    kPositive,     // operands[0]
    kConditional,  // operands[1] if operands[0] else operands[2], which may be null
    kAttribute,    // operands[0].name
    kItem,         // operands[0][operands[1]]
    kSlice,        // operands[0][operands[1]:operands[2]:operands[3]], each of them may be null
    kCall,         // operands[0](arguments)
    kFilter,       // operands[0] | name(arguments)
    kTest,         // operands[0] is name(arguments)
  };
  Kind kind = Kind::kConstant;
  int line = 0;
  Value constant = {};
  std::string name = {};
  std::vector<ExpressionPtr> operands = {};
  std::vector<BinaryOperator> binary = {};
  std::vector<CompareOperator> compare = {};
  std::vector<Argument> arguments = {};
};

struct Statement;
using Block = std::vector<std::unique_ptr<Statement>>;

struct MacroNode {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<ExpressionPtr> defaults;  // of the last parameters
  Block body;
};

struct Branch {
  ExpressionPtr condition;  // null: else
  Block body;
};

struct Statement {
  enum class Kind {
    kText,          // text
    kOutput,        // expression
    kIf,            // branches
    kFor,           // targets, expression (what is iterated), filter, body, otherwise
    kSet,           // targets, expression
    kSetAttribute,  // targets[0].attribute = expression
    kSetBlock,      // targets[0], body
    kScope,         // body, with its own variables
    kMacro,         // macro
    kBreak,
    kContinue,
  };
  Kind kind = Kind::kText;
  int line = 0;
  std::string text = {};
  ExpressionPtr expression = nullptr;
  std::vector<Branch> branches = {};
  std::vector<std::string> targets = {};
  std::string attribute = {};
  ExpressionPtr filter = nullptr;
  Block body = {};
  Block otherwise = {};
  bool uses_loop = false;  // kFor: something inside mentions `loop`
  std::unique_ptr<MacroNode> macro = nullptr;
};

}  // namespace walsh::jinja
