// A chat template: text within the limits, or a refusal, for conversations that templates tell
// apart.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "common/check.h"
#include "common/limits.h"
#include "common/utf8.h"
#include "tests/fuzz/refusal.h"
#include "worker/tokenizer/chat_template.h"

namespace walsh::fuzz {
namespace {

void CheckRendering(const ChatTemplate& chat_template, std::vector<ChatMessage> messages) {
  const absl::StatusOr<std::string> text =
      chat_template.Render({.messages = std::move(messages),
                            .bos_token = "<s>",
                            .eos_token = "</s>",
                            .now = absl::FromUnixSeconds(1'700'000'000)});
  if (!text.ok()) {
    CheckRefusal(text.status(),
                 {absl::StatusCode::kInvalidArgument, absl::StatusCode::kUnimplemented,
                  absl::StatusCode::kResourceExhausted});
    return;
  }
  WALSH_CHECK_LE(static_cast<int64_t>(text->size()), limits::kTemplateOutputBytesMax);
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using walsh::fuzz::CheckRefusal;
  const std::string_view source(reinterpret_cast<const char*>(data), size);
  const auto chat_template = walsh::ChatTemplate::Parse(source);
  if (!chat_template.ok()) {
    CheckRefusal(chat_template.status(),
                 {absl::StatusCode::kInvalidArgument, absl::StatusCode::kUnimplemented,
                  absl::StatusCode::kResourceExhausted});
    return 0;
  }
  walsh::fuzz::CheckRendering(**chat_template, {});
  walsh::fuzz::CheckRendering(**chat_template, {{"system", "Be terse."},
                                                {"user", " Straße, 你好 {{ 1 }}\n"},
                                                {"assistant", "<think>hm</think>Hi"},
                                                {"user", ""}});
  return 0;
}
