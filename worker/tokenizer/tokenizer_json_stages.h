// The stages of tokenizer.json around the model: normalizer, pre-tokenizer, post-processor,
// decoder.
//
// Errors:  INVALID_ARGUMENT  a malformed stage; the message names it
//          UNIMPLEMENTED     a stage, or an option of one, that walsh does not have
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "absl/status/status.h"
#include "worker/tokenizer/bpe_tokenizer.h"

namespace walsh {

absl::Status ReadNormalizer(const nlohmann::json& root, BpeTokenizerParts& parts);
// Also sets `is_byte_level`.
absl::Status ReadPreTokenizer(const nlohmann::json& root, BpeTokenizerParts& parts);
// After ReadPreTokenizer: a byte-level vocabulary must have a byte-level decoder, and the reverse.
absl::Status ReadDecoder(const nlohmann::json& root, BpeTokenizerParts& parts);
// After the vocabulary was read.
absl::Status ReadPostProcessor(const nlohmann::json& root, BpeTokenizerParts& parts);

}  // namespace walsh
