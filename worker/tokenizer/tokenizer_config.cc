#include "worker/tokenizer/tokenizer_config.h"

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/tokenizer/json_fields.h"

namespace walsh {
namespace {

using nlohmann::json;

// "<s>", {"content": "<s>", …} or null.
absl::StatusOr<std::string> SpecialToken(const json& root, const char* field) {
  const json* value = Find(root, field);
  if (value != nullptr && value->is_object()) return StringField(*value, "content", std::nullopt);
  return StringField(root, field, "");
}

absl::StatusOr<std::optional<bool>> OptionalBool(const json& root, const char* field) {
  const json* value = Find(root, field);
  if (value == nullptr || value->is_null()) return std::optional<bool>();
  WALSH_ASSIGN_OR_RETURN(const bool flag, BoolField(root, field, false));
  return std::optional<bool>(flag);
}

absl::StatusOr<TokenizerConfig> Read(const json& root) {
  TokenizerConfig config;
  WALSH_ASSIGN_OR_RETURN(config.tokenizer_class, StringField(root, "tokenizer_class", ""));
  WALSH_ASSIGN_OR_RETURN(config.bos_token, SpecialToken(root, "bos_token"));
  WALSH_ASSIGN_OR_RETURN(config.eos_token, SpecialToken(root, "eos_token"));
  WALSH_ASSIGN_OR_RETURN(config.adds_bos, OptionalBool(root, "add_bos_token"));
  WALSH_ASSIGN_OR_RETURN(config.adds_eos, OptionalBool(root, "add_eos_token"));
  return config;
}

}  // namespace

absl::StatusOr<TokenizerConfig> ReadTokenizerConfig(std::string_view text) {
  if (text.empty()) return TokenizerConfig{};
  WALSH_ASSIGN_OR_RETURN(const json root,
                         ParseBoundedJson("tokenizer_config.json", text,
                                          {.bytes_max = limits::kConfigFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  absl::StatusOr<TokenizerConfig> config = Read(root);
  if (config.ok()) return config;
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer_config.json: ", std::string(config.status().message())));
}

}  // namespace walsh
