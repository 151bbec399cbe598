// What makes text of a model's tokens, and tokens of text.
//
// Errors:  those of Tokenizer::Create
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/tokenizer/chat_template.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::engine {

struct ModelText {
  std::unique_ptr<Tokenizer> tokenizer;
  // Null: the model has none. A template that cannot be parsed is one that renders to UNIMPLEMENTED
  // with the reason, as the model still generates from plain prompts.
  std::unique_ptr<ChatTemplate> chat_template;
};
absl::StatusOr<ModelText> LoadText(const TokenizerSource& source);

}  // namespace walsh::engine
