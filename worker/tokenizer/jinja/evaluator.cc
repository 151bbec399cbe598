#include "worker/tokenizer/jinja/evaluator.h"

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/tokenizer/jinja/arguments.h"
#include "worker/tokenizer/jinja/attributes.h"
#include "worker/tokenizer/jinja/budget.h"
#include "worker/tokenizer/jinja/filters.h"
#include "worker/tokenizer/jinja/functions.h"
#include "worker/tokenizer/jinja/lexer.h"
#include "worker/tokenizer/jinja/methods.h"
#include "worker/tokenizer/jinja/operators.h"
#include "worker/tokenizer/jinja/predicates.h"

namespace walsh::jinja {
namespace {

using Kind = Expression::Kind;

// Blocks, expressions and macro calls inside each other while a template runs.
constexpr int kRunDepthMax = 8 * limits::kTemplateDepthMax;

// Jinja has them, the subset does not; without this they would seem to be misspelt variables.
constexpr std::array<std::string_view, 7> kMissingGlobals = {"lipsum", "cycler",  "joiner", "self",
                                                             "caller", "varargs", "kwargs"};

// The line goes in front of a message that has none yet.
absl::Status At(int line, const absl::Status& status) {
  if (status.ok() || absl::StartsWith(status.message(), "chat template")) return status;
  return absl::Status(status.code(),
                      absl::StrCat("chat template, line ", line, ": ", status.message(),
                                   absl::IsUnimplemented(status) ? " is not supported" : ""));
}

absl::StatusOr<Value> At(int line, absl::StatusOr<Value> value) {
  if (!value.ok()) return At(line, value.status());
  return value;
}

absl::Status CheckSize(const Value& value) {
  if (value.depth() > limits::kTemplateDepthMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a value nested deeper than ", limits::kTemplateDepthMax, " levels"));
  }
  if (value.weight() > limits::kTemplateOutputBytesMax) {
    return absl::ResourceExhaustedError(absl::StrCat("a value of ", value.weight(),
                                                     " bytes and items, at most ",
                                                     limits::kTemplateOutputBytesMax));
  }
  return absl::OkStatus();
}

class Evaluator {
 public:
  explicit Evaluator(const Environment& environment) : now_(environment.now) {
    for (const auto& [name, value] : environment.variables) globals_.Set(name, value);
  }
  // Namespaces can refer to each other in circles, so they are emptied one by one.
  ~Evaluator() {
    for (const auto& names : namespaces_) names->attributes.clear();
  }
  Evaluator(const Evaluator&) = delete;
  Evaluator& operator=(const Evaluator&) = delete;

  absl::StatusOr<std::string> Run(const Block& block) {
    std::string out;
    WALSH_RETURN_IF_ERROR(Execute(block, globals_, out).status());
    return out;
  }

 private:
  // The variables of the template, of one loop iteration or of one macro call.
  struct Frame {
    Frame* parent = nullptr;
    absl::flat_hash_map<std::string_view, Value> names = {};

    void Set(std::string_view name, Value value) { names.insert_or_assign(name, std::move(value)); }
    const Value* Find(std::string_view name) const {
      for (const Frame* frame = this; frame != nullptr; frame = frame->parent) {
        const auto found = frame->names.find(name);
        if (found != frame->names.end()) return &found->second;
      }
      return nullptr;
    }
  };

  enum class Flow { kNext, kBreak, kContinue };

  // Counts a level of recursion and a step.
  class Level {
   public:
    explicit Level(Evaluator* evaluator) : evaluator_(*evaluator) { ++evaluator_.depth_; }
    ~Level() { --evaluator_.depth_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

    absl::Status Check() const {
      if (evaluator_.depth_ > kRunDepthMax) {
        return absl::ResourceExhaustedError(
            absl::StrCat("evaluation nested deeper than ", kRunDepthMax, " levels"));
      }
      return evaluator_.budget_.SpendSteps(1);
    }

   private:
    Evaluator& evaluator_;
  };

  // -- Statements

  absl::StatusOr<Flow> Execute(const Block& block, Frame& frame, std::string& out) {
    for (const auto& statement : block) {
      const Level level(this);
      if (const auto status = level.Check(); !status.ok()) return At(statement->line, status);
      absl::StatusOr<Flow> flow = ExecuteOne(*statement, frame, out);
      if (!flow.ok()) return At(statement->line, flow.status());
      if (*flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  absl::StatusOr<Flow> ExecuteOne(const Statement& statement, Frame& frame, std::string& out) {
    switch (statement.kind) {
      case Statement::Kind::kText:
        WALSH_RETURN_IF_ERROR(Print(statement.text, out));
        return Flow::kNext;
      case Statement::Kind::kOutput:
        WALSH_RETURN_IF_ERROR(ExecuteOutput(statement, frame, out));
        return Flow::kNext;
      case Statement::Kind::kIf:
        return ExecuteIf(statement, frame, out);
      case Statement::Kind::kFor:
        return ExecuteFor(statement, frame, out);
      case Statement::Kind::kSet: {
        WALSH_ASSIGN_OR_RETURN(Value value, Evaluate(*statement.expression, frame));
        WALSH_RETURN_IF_ERROR(Assign(statement.targets, std::move(value), frame));
        return Flow::kNext;
      }
      case Statement::Kind::kSetAttribute:
        WALSH_RETURN_IF_ERROR(ExecuteSetAttribute(statement, frame));
        return Flow::kNext;
      case Statement::Kind::kSetBlock: {
        std::string text;
        Frame inner{.parent = &frame};
        WALSH_ASSIGN_OR_RETURN(const Flow flow, Execute(statement.body, inner, text));
        frame.Set(statement.targets[0], Value(std::move(text)));
        return flow;
      }
      case Statement::Kind::kScope: {
        Frame inner{.parent = &frame};
        return Execute(statement.body, inner, out);
      }
      case Statement::Kind::kMacro:
        frame.Set(statement.macro->name,
                  Value(std::make_shared<const Callable>(
                      Callable{.name = statement.macro->name, .macro = statement.macro.get()})));
        return Flow::kNext;
      case Statement::Kind::kBreak:
        return Flow::kBreak;
      case Statement::Kind::kContinue:
        return Flow::kContinue;
    }
    return absl::InternalError("a statement of no kind");
  }

  absl::Status Print(std::string_view text, std::string& out) {
    WALSH_RETURN_IF_ERROR(budget_.SpendBytes(text.size()));
    out.append(text);
    if (static_cast<int64_t>(out.size()) <= limits::kTemplateOutputBytesMax) {
      return absl::OkStatus();
    }
    return absl::ResourceExhaustedError(
        absl::StrCat("output of more than ", limits::kTemplateOutputBytesMax, " bytes"));
  }

  absl::Status ExecuteOutput(const Statement& statement, Frame& frame, std::string& out) {
    WALSH_ASSIGN_OR_RETURN(const Value value, Evaluate(*statement.expression, frame));
    if (value.names() != nullptr || value.callable() != nullptr) {
      return absl::UnimplementedError(absl::StrCat("output of a ", std::string(value.TypeName())));
    }
    if (const std::string* text = value.string()) return Print(*text, out);
    WALSH_RETURN_IF_ERROR(AllowTextOf(value, budget_));
    return Print(ToText(value), out);
  }

  absl::StatusOr<Flow> ExecuteIf(const Statement& statement, Frame& frame, std::string& out) {
    for (const Branch& branch : statement.branches) {
      bool holds = true;
      if (branch.condition != nullptr) {
        WALSH_ASSIGN_OR_RETURN(const Value condition, Evaluate(*branch.condition, frame));
        holds = condition.IsTrue();
      }
      if (holds) return Execute(branch.body, frame, out);
    }
    return Flow::kNext;
  }

  // The items that the loop's own `if` keeps.
  absl::StatusOr<std::vector<Value>> LoopItems(const Statement& statement, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(const Value iterated, Evaluate(*statement.expression, frame));
    WALSH_ASSIGN_OR_RETURN(std::vector<Value> items, Iterate(iterated, budget_));
    if (statement.filter == nullptr) return items;
    std::vector<Value> kept;
    for (Value& item : items) {
      Frame inner{.parent = &frame};
      WALSH_RETURN_IF_ERROR(Assign(statement.targets, item, inner));
      WALSH_ASSIGN_OR_RETURN(const Value keeps, Evaluate(*statement.filter, inner));
      if (keeps.IsTrue()) kept.push_back(std::move(item));
    }
    return kept;
  }

  static Value LoopVariable(const std::vector<Value>& items, size_t at) {
    const int64_t index = static_cast<int64_t>(at);
    const int64_t length = static_cast<int64_t>(items.size());
    std::vector<std::pair<std::string, Value>> fields = {
        {"index", Value(index + 1)},         {"index0", Value(index)},
        {"revindex", Value(length - index)}, {"revindex0", Value(length - index - 1)},
        {"first", Value(at == 0)},           {"last", Value(at + 1 == items.size())},
        {"length", Value(length)},           {"depth", Value(int64_t{1})},
        {"depth0", Value(int64_t{0})}};
    if (at > 0) fields.emplace_back("previtem", items[at - 1]);
    if (at + 1 < items.size()) fields.emplace_back("nextitem", items[at + 1]);
    return Value::MakeMap(std::move(fields));
  }

  absl::StatusOr<Flow> ExecuteFor(const Statement& statement, Frame& frame, std::string& out) {
    WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, LoopItems(statement, frame));
    if (items.empty()) return Execute(statement.otherwise, frame, out);
    for (size_t at = 0; at < items.size(); ++at) {
      WALSH_RETURN_IF_ERROR(budget_.SpendSteps(1));
      Frame inner{.parent = &frame};
      WALSH_RETURN_IF_ERROR(Assign(statement.targets, items[at], inner));
      if (statement.uses_loop) inner.Set("loop", LoopVariable(items, at));
      WALSH_ASSIGN_OR_RETURN(const Flow flow, Execute(statement.body, inner, out));
      if (flow == Flow::kBreak) break;
    }
    return Flow::kNext;
  }

  absl::Status Assign(const std::vector<std::string>& targets, Value value, Frame& frame) {
    if (targets.size() == 1) {
      frame.Set(targets[0], std::move(value));
      return absl::OkStatus();
    }
    WALSH_ASSIGN_OR_RETURN(const std::vector<Value> items, Iterate(value, budget_));
    if (items.size() != targets.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a value of ", items.size(), " items for ", targets.size(), " names"));
    }
    for (size_t i = 0; i < items.size(); ++i) frame.Set(targets[i], items[i]);
    return absl::OkStatus();
  }

  absl::Status ExecuteSetAttribute(const Statement& statement, Frame& frame) {
    const Value* object = frame.Find(statement.targets[0]);
    if (object == nullptr || object->names() == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", statement.targets[0], "' is not a namespace"));
    }
    WALSH_ASSIGN_OR_RETURN(Value value, Evaluate(*statement.expression, frame));
    // The evaluation may have moved the frame's values.
    object = frame.Find(statement.targets[0]);
    WALSH_RETURN_IF_ERROR(
        budget_.SpendBytes(object->names()->attributes.size() * (statement.attribute.size() + 1)));
    object->names()->Set(statement.attribute, std::move(value));
    return absl::OkStatus();
  }

  // -- Expressions

  absl::StatusOr<Value> Evaluate(const Expression& expression, Frame& frame) {
    const Level level(this);
    if (const auto status = level.Check(); !status.ok()) return At(expression.line, status);
    return At(expression.line, EvaluateOne(expression, frame));
  }

  absl::StatusOr<Value> EvaluateOne(const Expression& expression, Frame& frame) {
    switch (expression.kind) {
      case Kind::kConstant:
        return expression.constant;
      case Kind::kName:
        return Lookup(expression.name, frame);
      case Kind::kList:
      case Kind::kTuple:
        return EvaluateList(expression, frame);
      case Kind::kMap:
        return EvaluateMap(expression, frame);
      case Kind::kBinary:
        return EvaluateBinary(expression, frame);
      case Kind::kCompare:
        return EvaluateCompare(expression, frame);
      case Kind::kAnd:
      case Kind::kOr:
        return EvaluateLogic(expression, frame);
      case Kind::kConditional:
        return EvaluateConditional(expression, frame);
      case Kind::kSlice:
        return EvaluateSlice(expression, frame);
      case Kind::kCall:
        return EvaluateCall(expression, frame);
      default:
        return EvaluateUnary(expression, frame);
    }
  }

  absl::StatusOr<Value> Lookup(const std::string& name, const Frame& frame) {
    if (const Value* found = frame.Find(name)) return *found;
    if (IsFunction(name)) {
      return Value(std::make_shared<const Callable>(Callable{.name = name}));
    }
    if (std::find(kMissingGlobals.begin(), kMissingGlobals.end(), name) != kMissingGlobals.end()) {
      return absl::UnimplementedError(absl::StrCat("'", name, "'"));
    }
    return Value::UndefinedBecause(absl::StrCat("'", name, "' is undefined"));
  }

  absl::StatusOr<Value> EvaluateList(const Expression& expression, Frame& frame) {
    std::vector<Value> items;
    for (const ExpressionPtr& operand : expression.operands) {
      WALSH_ASSIGN_OR_RETURN(Value item, Evaluate(*operand, frame));
      items.push_back(std::move(item));
    }
    Value list = Value::MakeList(std::move(items), expression.kind == Kind::kTuple);
    WALSH_RETURN_IF_ERROR(CheckSize(list));
    return list;
  }

  absl::StatusOr<Value> EvaluateMap(const Expression& expression, Frame& frame) {
    Namespace items;  // of two equal keys the last value counts, at the first place
    for (size_t i = 0; i < expression.operands.size(); i += 2) {
      WALSH_ASSIGN_OR_RETURN(const Value key, Evaluate(*expression.operands[i], frame));
      WALSH_ASSIGN_OR_RETURN(Value value, Evaluate(*expression.operands[i + 1], frame));
      if (key.string() == nullptr) {
        return absl::UnimplementedError(
            absl::StrCat("a key of type ", std::string(key.TypeName())));
      }
      const size_t key_bytes = key.string()->size();
      WALSH_RETURN_IF_ERROR(
          budget_.SpendBytes(items.attributes.size() * (key_bytes + 1) + key_bytes));
      items.Set(*key.string(), std::move(value));
    }
    Value map = Value::MakeMap(std::move(items.attributes));
    WALSH_RETURN_IF_ERROR(CheckSize(map));
    return map;
  }

  absl::StatusOr<Value> EvaluateBinary(const Expression& expression, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(Value left, Evaluate(*expression.operands[0], frame));
    for (size_t i = 0; i < expression.binary.size(); ++i) {
      WALSH_ASSIGN_OR_RETURN(const Value right, Evaluate(*expression.operands[i + 1], frame));
      WALSH_ASSIGN_OR_RETURN(left, Apply(expression.binary[i], left, right, budget_));
      WALSH_RETURN_IF_ERROR(CheckSize(left));
    }
    return left;
  }

  absl::StatusOr<Value> EvaluateCompare(const Expression& expression, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(Value left, Evaluate(*expression.operands[0], frame));
    for (size_t i = 0; i < expression.compare.size(); ++i) {
      WALSH_ASSIGN_OR_RETURN(Value right, Evaluate(*expression.operands[i + 1], frame));
      WALSH_ASSIGN_OR_RETURN(const bool holds,
                             Compare(expression.compare[i], left, right, budget_));
      if (!holds) return Value(false);
      left = std::move(right);
    }
    return Value(true);
  }

  // The first operand that decides, or the last one.
  absl::StatusOr<Value> EvaluateLogic(const Expression& expression, Frame& frame) {
    Value value;
    for (const ExpressionPtr& operand : expression.operands) {
      WALSH_ASSIGN_OR_RETURN(value, Evaluate(*operand, frame));
      if (value.IsTrue() == (expression.kind == Kind::kOr)) break;
    }
    return value;
  }

  absl::StatusOr<Value> EvaluateConditional(const Expression& expression, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(const Value condition, Evaluate(*expression.operands[0], frame));
    if (condition.IsTrue()) return Evaluate(*expression.operands[1], frame);
    if (expression.operands[2] != nullptr) return Evaluate(*expression.operands[2], frame);
    return Value::UndefinedBecause("an 'if' without 'else' was false");
  }

  absl::StatusOr<Value> EvaluateSlice(const Expression& expression, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(const Value sequence, Evaluate(*expression.operands[0], frame));
    std::array<std::optional<int64_t>, 3> bounds;
    for (size_t i = 0; i < bounds.size(); ++i) {
      const ExpressionPtr& operand = expression.operands[i + 1];
      if (operand == nullptr) continue;
      WALSH_ASSIGN_OR_RETURN(const Value bound, Evaluate(*operand, frame));
      if (bound.is_none()) continue;
      WALSH_ASSIGN_OR_RETURN(bounds[i], IntegerArgument("[:]", bound));
    }
    return Slice(sequence, bounds[0], bounds[1], bounds[2], budget_);
  }

  // What has one operand, and perhaps a name and arguments.
  absl::StatusOr<Value> EvaluateUnary(const Expression& expression, Frame& frame) {
    const Expression& inner = *expression.operands[0];
    if (expression.kind == Kind::kAttribute && inner.kind == Kind::kName && inner.name == "loop" &&
        (expression.name == "cycle" || expression.name == "changed")) {
      return absl::UnimplementedError(absl::StrCat("'loop.", expression.name, "'"));
    }
    WALSH_ASSIGN_OR_RETURN(const Value value, Evaluate(inner, frame));
    switch (expression.kind) {
      case Kind::kNot:
        return Value(!value.IsTrue());
      case Kind::kNegate:
        return Negate(value);
      case Kind::kPositive: {
        WALSH_ASSIGN_OR_RETURN(const Value negative, Negate(value));
        return Negate(negative);
      }
      case Kind::kAttribute:
        return AttributeOf(value, expression.name, budget_);
      case Kind::kItem: {
        WALSH_ASSIGN_OR_RETURN(const Value index, Evaluate(*expression.operands[1], frame));
        return SubscriptOf(value, index, budget_);
      }
      default:
        break;
    }
    WALSH_ASSIGN_OR_RETURN(const Arguments arguments,
                           EvaluateArguments(expression.arguments, frame));
    if (expression.kind == Kind::kTest) {
      WALSH_ASSIGN_OR_RETURN(const bool holds,
                             ApplyTest(expression.name, value, arguments, budget_));
      return Value(holds);
    }
    WALSH_ASSIGN_OR_RETURN(Value filtered, ApplyFilter(expression.name, value, arguments, budget_));
    WALSH_RETURN_IF_ERROR(CheckSize(filtered));
    return filtered;
  }

  absl::StatusOr<Arguments> EvaluateArguments(const std::vector<Argument>& expressions,
                                              Frame& frame) {
    Arguments arguments;
    for (const Argument& argument : expressions) {
      WALSH_ASSIGN_OR_RETURN(Value value, Evaluate(*argument.value, frame));
      if (argument.name.empty()) {
        arguments.positional.push_back(std::move(value));
      } else {
        arguments.named.emplace_back(argument.name, std::move(value));
      }
    }
    return arguments;
  }

  absl::StatusOr<Value> EvaluateCall(const Expression& expression, Frame& frame) {
    WALSH_ASSIGN_OR_RETURN(const Value callee, Evaluate(*expression.operands[0], frame));
    const Callable* callable = callee.callable();
    if (callee.is_undefined()) {
      return absl::InvalidArgumentError(std::string(callee.undefined_reason()));
    }
    if (callable == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("a ", std::string(callee.TypeName()), " is called"));
    }
    WALSH_ASSIGN_OR_RETURN(const Arguments arguments,
                           EvaluateArguments(expression.arguments, frame));
    if (callable->macro != nullptr) return CallMacro(*callable->macro, arguments);
    absl::StatusOr<Value> result =
        callable->self != nullptr ? CallMethod(*callable->self, callable->name, arguments, budget_)
                                  : CallFunction(callable->name, arguments, now_, budget_);
    WALSH_RETURN_IF_ERROR(result.status());
    WALSH_RETURN_IF_ERROR(CheckSize(*result));
    if (callable->name == "namespace" && callable->self == nullptr) {
      namespaces_.push_back(result->shared_names());
    }
    return result;
  }

  // A macro sees its arguments and the template's own variables.
  absl::StatusOr<Value> CallMacro(const MacroNode& macro, const Arguments& arguments) {
    const size_t n = macro.parameters.size();
    if (arguments.positional.size() > n) {
      return absl::InvalidArgumentError(absl::StrCat("macro '", macro.name, "' takes at most ", n,
                                                     " arguments, not ",
                                                     arguments.positional.size()));
    }
    WALSH_RETURN_IF_ERROR(budget_.SpendBytes(8 * n * (arguments.named.size() + 1)));
    for (const auto& [name, value] : arguments.named) {
      const auto known = std::find(macro.parameters.begin(), macro.parameters.end(), name);
      if (known == macro.parameters.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("macro '", macro.name, "' has no parameter '", name, "'"));
      }
    }
    Frame frame{.parent = &globals_};
    for (size_t i = 0; i < n; ++i) {
      const std::string& name = macro.parameters[i];
      const auto named = std::find_if(arguments.named.begin(), arguments.named.end(),
                                      [&](const auto& item) { return item.first == name; });
      const size_t first_default = n - macro.defaults.size();
      if (i < arguments.positional.size()) {
        frame.Set(name, arguments.positional[i]);
      } else if (named != arguments.named.end()) {
        frame.Set(name, named->second);
      } else if (i >= first_default) {
        WALSH_ASSIGN_OR_RETURN(Value value, Evaluate(*macro.defaults[i - first_default], frame));
        frame.Set(name, std::move(value));
      } else {
        frame.Set(name,
                  Value::UndefinedBecause(absl::StrCat("parameter '", name, "' was not provided")));
      }
    }
    std::string text;
    WALSH_RETURN_IF_ERROR(Execute(macro.body, frame, text).status());
    return Value(std::move(text));
  }

  const absl::Time now_;
  Frame globals_;
  Budget budget_;
  int depth_ = 0;
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

}  // namespace

absl::StatusOr<std::string> RenderTemplate(const Block& block, const Environment& environment) {
  return Evaluator(environment).Run(block);
}

}  // namespace walsh::jinja
