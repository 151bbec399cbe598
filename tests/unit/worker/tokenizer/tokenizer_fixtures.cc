#include "tests/unit/worker/tokenizer/tokenizer_fixtures.h"

#include <filesystem>
#include <fstream>
#include <iterator>

#include "common/check.h"
#include "common/status_macros.h"
#include "tests/testing/golden.h"
#include "tests/testing/status_matchers.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gguf_vocabulary.h"

namespace walsh::testing {

std::string ReadFileOrDie(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  WALSH_CHECK(file.good());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

nlohmann::json Golden(const std::string& name) {
  return nlohmann::json::parse(GoldenFile("tokenizer/" + name + ".json"));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerJson(const std::string& folder) {
  TokenizerSource source;
  source.tokenizer_json = ReadFileOrDie(folder + "/tokenizer.json");
  const std::string config = folder + "/tokenizer_config.json";
  if (std::filesystem::exists(config)) source.tokenizer_config_json = ReadFileOrDie(config);
  return Tokenizer::Create(source);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePiece(const std::string& path) {
  TokenizerSource source;
  source.sentencepiece_model = ReadFileOrDie(path);
  return Tokenizer::Create(source);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadGguf(const std::string& path) {
  TokenizerSource source;
  WALSH_ASSIGN_OR_RETURN(source.gguf, ReadGgufVocabulary(path));
  return Tokenizer::Create(source);
}

std::vector<int32_t> Ids(const Tokenizer& tokenizer, const std::string& text,
                         const Tokenizer::EncodeOptions& options) {
  auto ids = tokenizer.Encode(text, options);
  EXPECT_OK(ids);
  return ids.ok() ? *std::move(ids) : std::vector<int32_t>();
}

}  // namespace walsh::testing
