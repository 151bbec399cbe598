// The few fields of HF's tokenizer_config.json that a tokenizer needs.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

struct TokenizerConfig {
  std::string tokenizer_class;  // may be empty
  std::string bos_token;        // may be empty
  std::string eos_token;        // may be empty
  std::optional<bool> adds_bos;
  std::optional<bool> adds_eos;
};

// An empty text gives an empty configuration. INVALID_ARGUMENT names the field.
absl::StatusOr<TokenizerConfig> ReadTokenizerConfig(std::string_view text);

}  // namespace walsh
