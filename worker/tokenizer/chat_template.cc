#include "worker/tokenizer/chat_template.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/clock.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/jinja/evaluator.h"
#include "worker/tokenizer/jinja/parser.h"

namespace walsh {
namespace {

using jinja::Value;

absl::Status CheckMessages(const std::vector<ChatMessage>& messages) {
  if (messages.size() > static_cast<size_t>(limits::kChatMessagesMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat("messages: ", messages.size(), ", at most ", limits::kChatMessagesMax));
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!IsValidUtf8(messages[i].role) || !IsValidUtf8(messages[i].content)) {
      return absl::InvalidArgumentError(absl::StrCat("messages[", i, "] is not valid UTF-8"));
    }
  }
  return absl::OkStatus();
}

class ParsedChatTemplate final : public ChatTemplate {
 public:
  explicit ParsedChatTemplate(jinja::Block block) : block_(std::move(block)) {}

  absl::StatusOr<std::string> Render(const Variables& variables) const override {
    WALSH_RETURN_IF_ERROR(CheckMessages(variables.messages));
    std::vector<Value> messages;
    for (const ChatMessage& message : variables.messages) {
      messages.push_back(
          Value::MakeMap({{"role", Value(message.role)}, {"content", Value(message.content)}}));
    }
    const jinja::Environment environment = {
        .variables = {{"messages", Value::MakeList(std::move(messages))},
                      {"add_generation_prompt", Value(variables.add_generation_prompt)},
                      {"bos_token", Value(variables.bos_token)},
                      {"eos_token", Value(variables.eos_token)},
                      {"tools", Value(jinja::None{})},
                      {"documents", Value(jinja::None{})}},
        .now = variables.now.value_or(Clock::Real()->Now())};
    return jinja::RenderTemplate(block_, environment);
  }

 private:
  const jinja::Block block_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source) {
  WALSH_ASSIGN_OR_RETURN(jinja::Block block, jinja::ParseTemplate(source));
  return std::make_unique<ParsedChatTemplate>(std::move(block));
}

}  // namespace walsh
