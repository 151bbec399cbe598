#include "worker/engine/model_text.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace walsh::engine {
namespace {

// Answers every chat with what is wrong with the model's own template.
class UnusableChatTemplate final : public ChatTemplate {
 public:
  explicit UnusableChatTemplate(const absl::Status& problem)
      : status_(absl::StatusCode::kUnimplemented,
                absl::StrCat("the model's chat template cannot be used; use Generate: ",
                             problem.message())) {}
  absl::StatusOr<std::string> Render(const Variables&) const override { return status_; }

 private:
  const absl::Status status_;
};

// The model still generates from plain prompts where its template is broken or beyond ours.
std::unique_ptr<ChatTemplate> ParseChatTemplate(const std::string& source) {
  if (source.empty()) return nullptr;
  absl::StatusOr<std::unique_ptr<ChatTemplate>> parsed = ChatTemplate::Parse(source);
  if (parsed.ok()) return *std::move(parsed);
  WALSH_LOG(Warning, "the model's chat template cannot be used", {"error", parsed.status()});
  return std::make_unique<UnusableChatTemplate>(parsed.status());
}

}  // namespace

absl::StatusOr<ModelText> LoadText(const TokenizerSource& source) {
  ModelText text;
  WALSH_ASSIGN_OR_RETURN(text.tokenizer, Tokenizer::Create(source));
  text.chat_template = ParseChatTemplate(source.chat_template);
  return text;
}

}  // namespace walsh::engine
