// Tokenizers of real models for the tests, and the golden files beside the tests.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::testing {

std::string ReadFileOrDie(const std::string& path);
// tests/golden/tokenizer/{name}.json
nlohmann::json Golden(const std::string& name);

// `folder` holds tokenizer.json and, perhaps, tokenizer_config.json.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerJson(const std::string& folder);
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path);
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGguf(const std::string& path);

// Text and options to ids; a failure is a failed test.
std::vector<int32_t> Ids(const Tokenizer& tokenizer, const std::string& text,
                         const Tokenizer::EncodeOptions& options = {});

}  // namespace walsh::testing
