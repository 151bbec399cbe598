#include "tests/fuzz/tokenizer_properties.h"

#include <cstdint>
#include <string_view>
#include <vector>

#include "common/check.h"
#include "common/utf8.h"
#include "tests/fuzz/refusal.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::fuzz {
namespace {

// Words, digits, spaces, several scripts, a token's spelling, bytes that no vocabulary need have.
constexpr std::string_view kTexts[] = {"", "Hello, world! I'll say 12345 things.\n\n  The\tend ",
                                       "<|begin|>héllo <s> Straße İ ﬁ 你好 🙂",
                                       "aaaaaaaaaaaaaaaa                \r\n\x01\x7f"};

void CheckEncoding(const Tokenizer& tokenizer, std::string_view text) {
  const absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(text, {});
  if (!ids.ok()) {
    CheckRefusal(ids.status(),
                 {absl::StatusCode::kInvalidArgument, absl::StatusCode::kResourceExhausted});
    return;
  }
  for (const int32_t id : *ids) {
    WALSH_CHECK_GE(id, 0);
    WALSH_CHECK_LT(id, tokenizer.vocab_size());
  }
  for (const bool skip_special : {false, true}) {
    WALSH_CHECK(IsValidUtf8(tokenizer.Decode(*ids, skip_special)));
  }
}

}  // namespace

void CheckTokenizer(const TokenizerSource& source) {
  const absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Create(source);
  if (!tokenizer.ok()) {
    CheckRefusal(tokenizer.status(),
                 {absl::StatusCode::kInvalidArgument, absl::StatusCode::kUnimplemented,
                  absl::StatusCode::kResourceExhausted});
    return;
  }
  for (const std::string_view text : kTexts) CheckEncoding(**tokenizer, text);
  for (const int32_t id : {-1, 0, (*tokenizer)->vocab_size() - 1, (*tokenizer)->vocab_size()}) {
    const std::string bytes = (*tokenizer)->TokenBytes(id, /*skip_special=*/false);
    const bool is_inside = id >= 0 && id < (*tokenizer)->vocab_size();
    WALSH_CHECK(is_inside || bytes.empty());
  }
}

}  // namespace walsh::fuzz
