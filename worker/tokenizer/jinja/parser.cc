#include "worker/tokenizer/jinja/parser.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/jinja/expression_parser.h"
#include "worker/tokenizer/jinja/lexer.h"
#include "worker/tokenizer/jinja/token_stream.h"

namespace walsh::jinja {
namespace {

using Kind = Statement::Kind;

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)), expressions_(&tokens_) {}

  absl::StatusOr<Block> Run() {
    WALSH_ASSIGN_OR_RETURN(Block block, ParseBlock({}));
    if (!tokens_.Is(Token::Kind::kEnd)) return tokens_.Unexpected("a statement");
    return block;
  }

 private:
  using Result = absl::StatusOr<std::unique_ptr<Statement>>;

  std::unique_ptr<Statement> Make(Kind kind) const {
    auto statement = std::make_unique<Statement>();
    statement->kind = kind;
    statement->line = tokens_.line();
    return statement;
  }

  // Statements up to a tag that begins with one of `ends`, whose "{%" is consumed and whose name is
  // the current token; without ends, to the end of the template.
  absl::StatusOr<Block> ParseBlock(std::initializer_list<std::string_view> ends) {
    WALSH_RETURN_IF_ERROR(tokens_.Enter());
    Block block;
    while (!tokens_.Is(Token::Kind::kEnd)) {
      if (tokens_.Is(Token::Kind::kText)) {
        block.push_back(Make(Kind::kText));
        block.back()->text = tokens_.Take().text;
      } else if (tokens_.Is(Token::Kind::kOutputBegin)) {
        WALSH_ASSIGN_OR_RETURN(auto output, ParseOutput());
        block.push_back(std::move(output));
      } else {
        WALSH_RETURN_IF_ERROR(tokens_.Expect(Token::Kind::kBlockBegin, "'{%'"));
        if (std::any_of(ends.begin(), ends.end(),
                        [this](std::string_view end) { return tokens_.IsName(end); })) {
          tokens_.Leave();
          return block;
        }
        WALSH_ASSIGN_OR_RETURN(auto statement, ParseStatement());
        block.push_back(std::move(statement));
      }
    }
    tokens_.Leave();
    if (ends.size() == 0) return block;
    return tokens_.Unexpected(absl::StrCat("'", std::string(*(ends.end() - 1)), "'"));
  }

  Result ParseOutput() {
    auto output = Make(Kind::kOutput);
    tokens_.Take();
    WALSH_ASSIGN_OR_RETURN(output->expression, expressions_.ParseTuple());
    WALSH_RETURN_IF_ERROR(tokens_.Expect(Token::Kind::kOutputEnd, "'}}'"));
    return output;
  }

  absl::Status ExpectBlockEnd() { return tokens_.Expect(Token::Kind::kBlockEnd, "'%}'"); }

  Result ParseStatement() {
    auto statement = Make(Kind::kText);
    WALSH_ASSIGN_OR_RETURN(const std::string name, tokens_.ExpectName());
    if (name == "if") return ParseIf(std::move(statement));
    if (name == "for") return ParseFor(std::move(statement));
    if (name == "set") return ParseSet(std::move(statement));
    if (name == "macro") return ParseMacro(std::move(statement));
    if (name == "generation") return ParseGeneration(std::move(statement));
    if (name == "break" || name == "continue") {
      if (loop_depth_ == 0)
        return SyntaxError(statement->line, absl::StrCat(name, " outside a loop"));
      statement->kind = name == "break" ? Kind::kBreak : Kind::kContinue;
      WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
      return statement;
    }
    if (name.starts_with("end") || name.starts_with("el")) {
      return SyntaxError(statement->line, absl::StrCat("unexpected '", name, "'"));
    }
    return NotSupported(statement->line, absl::StrCat("the statement '", name, "'"));
  }

  // The current token is the name of the tag that ended a block.
  absl::Status TakeEnd() {
    tokens_.Take();
    return ExpectBlockEnd();
  }

  Result ParseIf(std::unique_ptr<Statement> statement) {
    statement->kind = Kind::kIf;
    while (true) {
      Branch& branch = statement->branches.emplace_back();
      WALSH_ASSIGN_OR_RETURN(branch.condition, expressions_.ParseTuple());
      WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
      WALSH_ASSIGN_OR_RETURN(branch.body, ParseBlock({"elif", "else", "endif"}));
      if (!tokens_.TakeName("elif")) break;
    }
    if (tokens_.TakeName("else")) {
      WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
      Branch& branch = statement->branches.emplace_back();
      WALSH_ASSIGN_OR_RETURN(branch.body, ParseBlock({"endif"}));
    }
    WALSH_RETURN_IF_ERROR(TakeEnd());
    return statement;
  }

  absl::Status ParseTargets(std::vector<std::string>& targets) {
    const absl::Status brackets =
        NotSupported(tokens_.line(), "a name in brackets among the names of a 'for' or 'set'");
    const bool has_parenthesis = tokens_.TakeOperator("(");
    do {
      if (tokens_.IsOperator("(")) return brackets;
      if (tokens_.IsName("loop")) {
        return SyntaxError(tokens_.line(), "'loop' cannot be assigned");
      }
      WALSH_ASSIGN_OR_RETURN(std::string name, tokens_.ExpectName());
      targets.push_back(std::move(name));
    } while (tokens_.TakeOperator(","));
    if (!has_parenthesis) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator(")"));
    return tokens_.IsOperator(",") ? brackets : absl::OkStatus();
  }

  Result ParseFor(std::unique_ptr<Statement> statement) {
    statement->kind = Kind::kFor;
    WALSH_RETURN_IF_ERROR(ParseTargets(statement->targets));
    if (!tokens_.TakeName("in")) return tokens_.Unexpected("'in'");
    WALSH_ASSIGN_OR_RETURN(statement->expression,
                           expressions_.ParseTuple(/*with_condition=*/false));
    if (tokens_.TakeName("if")) {
      WALSH_ASSIGN_OR_RETURN(statement->filter, expressions_.Parse());
    }
    if (tokens_.IsName("recursive")) return NotSupported(statement->line, "'for … recursive'");
    WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
    // `loop` in the header belongs to the loop around this one.
    const bool header_uses_loop = expressions_.TakeUsesLoop();
    ++loop_depth_;
    absl::StatusOr<Block> body = ParseBlock({"else", "endfor"});
    --loop_depth_;
    WALSH_RETURN_IF_ERROR(body.status());
    statement->body = *std::move(body);
    statement->uses_loop = expressions_.TakeUsesLoop();
    if (tokens_.TakeName("else")) {
      WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
      WALSH_ASSIGN_OR_RETURN(statement->otherwise, ParseBlock({"endfor"}));
    }
    // What an inner loop mentions may be this one's, in its header.
    if (header_uses_loop || statement->uses_loop) expressions_.SetUsesLoop();
    WALSH_RETURN_IF_ERROR(TakeEnd());
    return statement;
  }

  Result ParseSet(std::unique_ptr<Statement> statement) {
    statement->kind = Kind::kSet;
    if (tokens_.Is(Token::Kind::kName) && tokens_.next().kind == Token::Kind::kOperator &&
        tokens_.next().text == ".") {
      statement->kind = Kind::kSetAttribute;
      statement->targets.push_back(tokens_.Take().text);
      tokens_.Take();
      WALSH_ASSIGN_OR_RETURN(statement->attribute, tokens_.ExpectName());
    } else {
      WALSH_RETURN_IF_ERROR(ParseTargets(statement->targets));
    }
    if (tokens_.TakeOperator("=")) {
      WALSH_ASSIGN_OR_RETURN(statement->expression, expressions_.ParseTuple());
      WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
      return statement;
    }
    if (statement->kind == Kind::kSetAttribute) {
      return NotSupported(statement->line, "'set' of a namespace's attribute to a block");
    }
    if (statement->targets.size() != 1) {
      return tokens_.Unexpected("'='");
    }
    if (tokens_.IsOperator("|"))
      return NotSupported(statement->line, "'set' of a block with filters");
    statement->kind = Kind::kSetBlock;
    WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
    WALSH_ASSIGN_OR_RETURN(statement->body, ParseBlock({"endset"}));
    WALSH_RETURN_IF_ERROR(TakeEnd());
    return statement;
  }

  Result ParseMacro(std::unique_ptr<Statement> statement) {
    if (loop_depth_ > 0 || in_macro_) {
      return NotSupported(statement->line, "a macro inside a loop or a macro");
    }
    statement->kind = Kind::kMacro;
    statement->macro = std::make_unique<MacroNode>();
    MacroNode& macro = *statement->macro;
    WALSH_ASSIGN_OR_RETURN(macro.name, tokens_.ExpectName());
    WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator("("));
    while (!tokens_.IsOperator(")")) {
      WALSH_ASSIGN_OR_RETURN(std::string parameter, tokens_.ExpectName());
      macro.parameters.push_back(std::move(parameter));
      if (tokens_.TakeOperator("=")) {
        WALSH_ASSIGN_OR_RETURN(ExpressionPtr value, expressions_.Parse());
        macro.defaults.push_back(std::move(value));
      } else if (!macro.defaults.empty()) {
        return SyntaxError(tokens_.line(), "a parameter without a default after one with it");
      }
      if (!tokens_.TakeOperator(",")) break;
    }
    WALSH_RETURN_IF_ERROR(tokens_.ExpectOperator(")"));
    WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
    in_macro_ = true;
    absl::StatusOr<Block> body = ParseBlock({"endmacro"});
    in_macro_ = false;
    WALSH_RETURN_IF_ERROR(body.status());
    macro.body = *std::move(body);
    WALSH_RETURN_IF_ERROR(TakeEnd());
    return statement;
  }

  // Hugging Face's mark around what the assistant said; it prints nothing itself.
  Result ParseGeneration(std::unique_ptr<Statement> statement) {
    statement->kind = Kind::kScope;
    WALSH_RETURN_IF_ERROR(ExpectBlockEnd());
    WALSH_ASSIGN_OR_RETURN(statement->body, ParseBlock({"endgeneration"}));
    WALSH_RETURN_IF_ERROR(TakeEnd());
    return statement;
  }

  TokenStream tokens_;
  ExpressionParser expressions_;
  int loop_depth_ = 0;
  bool in_macro_ = false;
};

}  // namespace

absl::StatusOr<Block> ParseTemplate(std::string_view source) {
  if (static_cast<int64_t>(source.size()) > limits::kTemplateBytesMax) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "chat template of ", source.size(), " bytes, at most ", limits::kTemplateBytesMax));
  }
  if (!IsValidUtf8(source)) {
    return absl::InvalidArgumentError("chat template: not valid UTF-8");
  }
  WALSH_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace walsh::jinja
